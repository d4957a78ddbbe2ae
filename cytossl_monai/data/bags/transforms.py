"""Transforms of bags: read one, leave tiles out, draw some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.bags.items import Item
from cytossl_monai.utils.errors import FeatureError

__all__ = ["LoadBagd", "RandTileDropoutd", "RandTileSampled"]


class LoadBagd(MapTransform):
    """Read a feature file: ``features`` becomes (N, D) float32, ``coords`` (N, 2) int64 and ``tile_size``
    (side of a tile in their units, 0 where the file does not say) are added.

    Args:
        keys: keys with paths of feature files.
        encoder: ``hash`` and ``dim`` that the features must have; None takes any.
        allow_missing_keys: see MONAI.
    """

    def __init__(
        self,
        keys: str | Sequence[str] = "features",
        encoder: Mapping[str, Any] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.encoder = dict(encoder or {})

    def __call__(self, data: Mapping[str, Any]) -> Item:
        """Item with paths -> item with tensors; raises FeatureError for unusable files."""
        item = dict(data)
        for key in self.key_iterator(item):
            path = item[key]
            bag = read_features(path)
            wanted_dim, wanted_hash = self.encoder.get("dim"), self.encoder.get("hash")
            if wanted_dim is not None and bag.features.shape[1] != wanted_dim:
                raise FeatureError(
                    f"feature file {path} has {bag.features.shape[1]} features a tile, {wanted_dim} are expected "
                    f"({self.encoder.get('name') or 'encoder of training'}); embed the slide with that encoder"
                )
            if wanted_hash is not None and bag.encoder is not None and bag.encoder != wanted_hash:
                raise FeatureError(
                    f"feature file {path} was made by the encoder {bag.encoder}, not by {wanted_hash}; embed the slide "
                    "with that encoder"
                )
            item[key] = torch.from_numpy(bag.features)
            item["coords"] = torch.from_numpy(bag.coords)
            item["tile_size"] = int(bag.attrs.get("patch_size_level0") or 0)
            item["feature_path"] = str(path)
        return item


class _RandTiles(Randomizable, MapTransform):
    """Base of the transforms that keep some tiles of a bag: the same ones of features and coordinates."""

    def __init__(self, keys: str | Sequence[str], allow_missing_keys: bool) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)

    def n_kept(self, n: int) -> int:
        """How many of n tiles to keep, at least one."""
        raise NotImplementedError

    def __call__(self, data: Mapping[str, Any]) -> Item:
        item = dict(data)
        n = len(item[self.keys[0]])
        kept = self.n_kept(n)
        if kept < n:
            places = torch.from_numpy(np.sort(self.R.choice(n, size=kept, replace=False)))
            for key in self.key_iterator(item):
                item[key] = item[key][places]
        return item


class RandTileDropoutd(_RandTiles):
    """Leave out a random share of the tiles: a regulariser for small cohorts.

    Args:
        max_share: the share left out is drawn from [0, max_share], in [0, 1); at least one tile stays.
        keys: what to take the tiles from.
        prob: how often to do it.
        allow_missing_keys: see MONAI.
    """

    def __init__(
        self,
        max_share: float = 0.5,
        keys: str | Sequence[str] = ("features", "coords"),
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0.0 <= max_share < 1.0:
            raise ValueError(f"max_share must be in [0, 1), got {max_share}")
        self.max_share, self.prob = max_share, prob

    def n_kept(self, n: int) -> int:
        """See the base."""
        if self.R.random() >= self.prob:
            return n
        return max(1, n - int(self.R.uniform(0.0, self.max_share) * n))


class RandTileSampled(_RandTiles):
    """Keep at most ``max_tiles`` tiles, drawn at random: bounds the memory that a huge slide takes in training.

    Args:
        max_tiles: the bound; None keeps all.
        keys: what to take the tiles from.
        allow_missing_keys: see MONAI.
    """

    def __init__(
        self,
        max_tiles: int | None = 8192,
        keys: str | Sequence[str] = ("features", "coords"),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if max_tiles is not None and max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {max_tiles}")
        self.max_tiles = max_tiles

    def n_kept(self, n: int) -> int:
        """See the base."""
        return n if self.max_tiles is None else min(n, self.max_tiles)
