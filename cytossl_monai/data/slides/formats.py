"""Formats of scanners that need a converter: what to do, by the file's suffix."""

from __future__ import annotations

__all__ = ["advice"]

# slideio was tried for CZI: it gives uncompressed pixels with blue first and refuses Zstandard. A reader that may swap
# colours without a word is none.

_ONWARD = "convert it to pyramidal TIFF or OME-TIFF"
_ADVICE = {
    ".kfb": f"KFBIO's format has no open reader: {_ONWARD} with KFBIO's own converter (KFbioConverter) or viewer",
    ".sdpc": f"Sqray's format has no open reader here: {_ONWARD} with Sqray's own viewer or converter",
    ".tmap": f"UNIC's format has no open reader: {_ONWARD} with UNIC's own viewer (TMAP)",
    ".tmapx": f"UNIC's format has no open reader: {_ONWARD} with UNIC's own viewer (TMAP)",
    ".isyntax": f"Philips' format has no reader here: {_ONWARD} with isyntax2raw and raw2ometiff (Glencoe Software)",
    ".i2syntax": f"Philips' format has no reader here: {_ONWARD} with Philips' own export",
    ".czi": f"{_ONWARD} with bioformats2raw and raw2ometiff (Glencoe Software)",
    ".vsi": f"{_ONWARD} with bioformats2raw and raw2ometiff (Glencoe Software)",
    ".zvi": f"{_ONWARD} with bioformats2raw and raw2ometiff (Glencoe Software)",
}


def advice(suffix: str) -> str:
    """What to do with a file that no reader opens.

    Args:
        suffix: of the file, with its dot.
    """
    usual = "check that it opens in a viewer, convert it to pyramidal TIFF, or leave it out"
    return _ADVICE.get(suffix.lower(), usual)
