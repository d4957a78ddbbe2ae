from .distributed import (
    init_distributed as init_distributed,
    rank as rank,
    shutdown_distributed as shutdown_distributed,
    world_size as world_size,
)
from .errors import (
    CheckpointError as CheckpointError,
    FeatureError as FeatureError,
    InputError as InputError,
    ShardError as ShardError,
    SlideError as SlideError,
    TableError as TableError,
    TrainingDiverged as TrainingDiverged,
)
from .locks import (
    FileLock as FileLock,
    LockedError as LockedError,
    folder_lock as folder_lock,
    item_lock as item_lock,
)
from .parallel import run_parallel as run_parallel
from .program import plain_errors as plain_errors
from .report import RunReport as RunReport, finish as finish
from .seeding import seed_all as seed_all
from .shard import Shard as Shard, choose_shard as choose_shard

__all__ = [
    "CheckpointError",
    "FeatureError",
    "FileLock",
    "InputError",
    "LockedError",
    "RunReport",
    "Shard",
    "ShardError",
    "SlideError",
    "TableError",
    "TrainingDiverged",
    "choose_shard",
    "finish",
    "folder_lock",
    "init_distributed",
    "item_lock",
    "plain_errors",
    "rank",
    "run_parallel",
    "seed_all",
    "shutdown_distributed",
    "world_size",
]
