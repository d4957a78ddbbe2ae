"""A pretraining by ``configs/scale/gpu.yaml`` on tiles in memory, watched by kNN on made-up cells with known classes.

    python scripts/bench/gpu/pretraining.py --seconds 300

The tiles are those of made-up slides; two classes of cells tell whether the encoder learns anything at all.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, cells, figure
from PIL import Image

from cytossl_monai.metrics import read_log

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "bundles" / "cytossl_pretrain" / "configs"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=int, default=40, help="about so long, in training")
    args = parser.parse_args()
    count, size = (24, 64) if args.dry else (1024, 224)
    with tempfile.TemporaryDirectory() as folder:
        images, labels, output = (Path(folder) / name for name in ("images", "labels", "out"))
        images.mkdir()
        for number, tile in enumerate(cells(count, size)):
            Image.fromarray(tile.permute(1, 2, 0).numpy()).save(images / f"{number:05d}.png", compress_level=1)
        for number, tile in enumerate(cells(24 if args.dry else 400, 64, seed=1)):
            picture = tile.permute(1, 2, 0).numpy()
            darker = number % 2
            target = labels / ("abnormal" if darker else "normal") / f"{number:04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((picture * 0.8).astype("uint8") if darker else picture).save(target)
        # The length is set by steps: a first guess of 8 a second, corrected by what the log says.
        steps = 2 if args.dry else max(20, 8 * args.seconds)
        files = [
            CONFIGS / "train.json",
            ROOT / "configs" / "data" / "images.yaml",
            ROOT / "configs" / "scale" / "gpu.yaml",
        ]
        settings = {
            "dataset_dir": images,
            "labels": labels,
            "output_dir": output,
            "steps": steps,
            "epoch_length": max(1, steps // 4),
            "image_fit": "square",
            "images_mpp": 0.5,
            "labels_mpp": 0.5,
            "num_workers": 0 if args.dry else "auto",
            "log_every": 1,
            "batch_size": 8 if args.dry else 256,
        }
        if args.dry:
            settings |= {"tile_size": 64, "view_size": 32, "num_layers": 1, "cache_gb": 0.1}
        overrides = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        names = "[" + ",".join(f"'{path}'" for path in files) + "]"
        command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", names, *overrides]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            status = process.wait(timeout=600 if args.dry else args.seconds + 15)
        except subprocess.TimeoutExpired:
            process.terminate()  # saved, status 75: what was reached counts
            status = process.wait()
        log = read_log(output / "log.csv")
        for name in ("loss", "knn", "rankme", "images_per_s", "data_wait_share"):
            values = [value for _, _, figure_name, value in log if figure_name == name]
            if values:
                figure(f"{name}, first and last", [round(values[0], 4), round(values[-1], 4)])
        figure("steps", max((step for step, *_ in log), default=0))
        figure("seconds, start and kNN included", time.perf_counter() - start)
    return int(status not in (0, 75) or not log)


if __name__ == "__main__":
    sys.exit(main())
