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
    SlideError as SlideError,
    TableError as TableError,
    TrainingDiverged as TrainingDiverged,
    plain_errors as plain_errors,
)
from .locks import (
    FileLock as FileLock,
    LockedError as LockedError,
    folder_lock as folder_lock,
)
from .parallel import run_parallel as run_parallel
from .report import RunReport as RunReport, finish as finish
from .seeding import seed_all as seed_all

__all__ = [
    "CheckpointError",
    "FeatureError",
    "FileLock",
    "InputError",
    "LockedError",
    "RunReport",
    "SlideError",
    "TableError",
    "TrainingDiverged",
    "finish",
    "folder_lock",
    "init_distributed",
    "plain_errors",
    "rank",
    "run_parallel",
    "seed_all",
    "shutdown_distributed",
    "world_size",
]
