"""Build the release archives of the bundles: one zip a bundle, its weights inside, SHA256SUMS and the release notes.

python scripts/release.py --output dist --weights cytossl_pretrain=demo/encoder.pt --weights cytossl_mil=demo/model.pt

An archive unpacks to the bundle's folder, as `monai.bundle.download` expects. The same content gives the same bytes.
Nothing is built when a version has no changelog entry, versions disagree, or weights are of another kind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cytossl_monai
from cytossl_monai.networks import load_classifier, load_encoder
from cytossl_monai.utils import InputError, plain_errors
from cytossl_monai.utils.files import atomic_path, sha256_file, write_text

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {
    "cytossl_pretrain": {"model.pt": load_encoder},
    "cytossl_mil": {"model.pt": load_classifier},
    "cytossl_inference": {"model.pt": load_encoder, "classifier.pt": load_classifier},
}
"""Files of each bundle's models/ and what reads them."""

SHIPPED = {"cytossl_pretrain": {"lite0_cells.pt": load_encoder}}
"""Weights that lie in the checkout and go into every archive of their bundle, and what reads them."""

SKIPPED_FOLDERS = {"models", "output", "eval", "__pycache__"}
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class ReleaseError(ValueError):
    """What keeps a release from being built."""


def changelog_section(text: str, version: str) -> str:
    """The lines under ``## <version>`` (or ``## [<version>]``) of a changelog, without the heading.

    Raises:
        ReleaseError: when there is no such heading, or nothing under it.
    """
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    for part in parts:
        heading, _, body = part.partition("\n")
        if re.match(rf"\[?{re.escape(version)}\]?(\s|$)", heading):
            if not body.strip():
                raise ReleaseError(f"CHANGELOG.md says nothing under {version}; write what changed")
            return body.strip() + "\n"
    raise ReleaseError(f"CHANGELOG.md has no entry '## {version}'; rename 'Unreleased' or write one")


def check_bundle(bundle: Path) -> str:
    """The version of a bundle, once its metadata agree with themselves and with the package.

    Raises:
        ReleaseError: when they do not, or a file that every bundle has is missing.
    """
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md", "large_files.yml"):
        if not (bundle / name).is_file():
            raise ReleaseError(f"{bundle / name} is missing")
    for name, read in SHIPPED.get(bundle.name, {}).items():
        try:
            read(bundle / "models" / name)
        except InputError as error:
            raise ReleaseError(f"{error}; it is part of the checkout: git checkout -- {bundle / 'models'}") from error
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    version = str(metadata["version"])
    if version not in metadata["changelog"]:
        raise ReleaseError(f"{bundle.name}: metadata.json has no changelog entry for its version {version}")
    wanted = metadata["required_packages_version"].get("cytossl-monai")
    if wanted != cytossl_monai.__version__:
        raise ReleaseError(
            f"{bundle.name}: metadata.json requires cytossl-monai {wanted}, the package is {cytossl_monai.__version__}"
        )
    return version


def _weights(options: Sequence[str]) -> dict[str, dict[str, Path]]:
    """``bundle=path`` (its model.pt) and ``bundle/file=path`` as bundle -> file -> path, each read once to check it."""
    paths: dict[str, dict[str, Path]] = {name: {} for name in WEIGHTS}
    for option in options:
        target, _, value = option.partition("=")
        name, _, file = target.partition("/")
        file = file or "model.pt"
        if not value or file not in WEIGHTS.get(name, {}):
            known = ", ".join(f"{n}/{f}" for n, files in WEIGHTS.items() for f in files)
            raise ReleaseError(f"--weights {option}: write BUNDLE/FILE=PATH with one of {known}")
        path = Path(value)
        try:
            WEIGHTS[name][file](path)
        except InputError as error:
            raise ReleaseError(f"--weights {option}: {error}") from error
        paths[name][file] = path
    return paths


def _torchscript(bundle: Path, weights: Path, folder: Path) -> Path:
    """``model.ts`` of a bundle's network with these weights, as MONAI exports it."""
    from monai.bundle import ckpt_export

    path = folder / bundle.name / "model.ts"  # the name stays: MONAI Deploy looks for it inside the file
    path.parent.mkdir()
    key = {"cytossl_mil": "classifier"}.get(bundle.name, "encoder")
    with contextlib.redirect_stdout(sys.stderr):
        ckpt_export(
            net_id="network_def",
            filepath=str(path),
            ckpt_file=str(weights),
            meta_file=str(bundle / "configs" / "metadata.json"),
            config_file=str(bundle / "configs" / "inference.json"),
            bundle_root=str(bundle),
            device="$torch.device('cpu')",
            **{key: str(weights)},
        )
    return path


def write_archive(path: Path, bundle: Path, models: Mapping[str, Path]) -> Path:
    """Zip a bundle's folder with ``models`` in its models/; the bytes depend on the content alone."""
    members = {
        file.relative_to(bundle.parent).as_posix(): file
        for file in bundle.rglob("*")
        if file.is_file() and not SKIPPED_FOLDERS & set(file.relative_to(bundle).parts)
    }
    members[f"{bundle.name}/models/README.md"] = bundle / "models" / "README.md"
    members |= {f"{bundle.name}/models/{name}": bundle / "models" / name for name in SHIPPED.get(bundle.name, {})}
    members |= {f"{bundle.name}/models/{name}": file for name, file in models.items()}
    with atomic_path(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, _ZIP_TIME)
            info.external_attr = 0o644 << 16
            packed = Path(name).suffix not in (".pt", ".ts")  # these are zip files themselves
            info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            archive.writestr(info, members[name].read_bytes())
    return path


def build_release(
    output: Path, weights: Sequence[str] = (), root: Path = ROOT, torchscript: bool = True, draft: bool = False
) -> list[Path]:
    """Check everything, then write the archives, ``SHA256SUMS`` and ``RELEASE_NOTES.md``.

    Args:
        output: folder to write to.
        weights: ``BUNDLE=PATH`` or ``BUNDLE/FILE=PATH``.
        root: the checkout.
        torchscript: add ``models/model.ts`` where ``models/model.pt`` is given.
        draft: do without the changelog's entry of the version.

    Returns:
        the archives.

    Raises:
        ReleaseError: before anything is written.
    """
    bundles = [root / "bundles" / name for name in WEIGHTS]
    versions = {check_bundle(bundle) for bundle in bundles}
    if len(versions) > 1:
        raise ReleaseError(f"the bundles have different versions: {', '.join(sorted(versions))}")
    version = versions.pop()
    notes = "Draft.\n" if draft else changelog_section((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    paths = _weights(weights)
    output.mkdir(parents=True, exist_ok=True)
    archives = []
    with tempfile.TemporaryDirectory() as scratch:
        for bundle in bundles:
            models = dict(paths[bundle.name])
            if torchscript and "model.pt" in models:
                models["model.ts"] = _torchscript(bundle, models["model.pt"], Path(scratch))
            archives.append(write_archive(output / f"{bundle.name}_v{version}.zip", bundle, models))
    sums = "".join(f"{sha256_file(archive)}  {archive.name}\n" for archive in archives)
    write_text(output / "SHA256SUMS", sums)
    write_text(output / "RELEASE_NOTES.md", f"# Cyto-SSL on MONAI {version}\n\n{notes}\n```\n{sums}```\n")
    return archives


def main() -> None:
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--weights", action="append", default=[], metavar="BUNDLE[/FILE]=PATH")
    parser.add_argument("--no-torchscript", action="store_true", help="leave models/model.ts out")
    parser.add_argument("--draft", action="store_true", help="do without the version's entry in CHANGELOG.md")
    args = parser.parse_args()
    try:
        archives = build_release(args.output, args.weights, ROOT, not args.no_torchscript, args.draft)
    except ReleaseError as error:
        parser.exit(2, f"release.py: {error}\n")
    for archive in archives:
        print(f"{archive} ({archive.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
