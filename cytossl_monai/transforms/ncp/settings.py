"""What may be perturbed, how often and how much: the settings of Nuclei-Centered Perturbation, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.random import hash_uniform, hash_uniforms

__all__ = ["OP_NAMES", "PRESETS", "Draw", "NCPSettings", "OpSetting"]

OP_NAMES = ("swap", "shuffle", "stain", "blur", "fade", "cutout", "noise", "exchange")
"""In the order in which they are applied: what moves patches, what colours them, what a camera would add; and last the
published op, which strews what there is."""

BLUR_SIGMA_UM = 3.0  # sigma of a blur of strength 1
NOISE_STD = 0.15  # standard deviation of a noise of strength 1, as a part of the full range
CUTOUT_SIDE = 0.6  # longest side of a rectangle of a cut-out of strength 1, as a part of the tile's side
LEAST_PART = 0.3  # an op that is drawn acts with this part of its strength at least
_MICROMETRE_OPS = frozenset({"blur", "shuffle"})  # and "exchange", where its blocks are larger than a pixel

_ACTIVE_STREAM, _DRAW_STREAM, _AMOUNT_STREAM, _DONOR_STREAM = 1, 2, 3, 4


@dataclass(frozen=True)
class OpSetting:
    """How often and how much one op acts.

    Args:
        prob: probability that a perturbed sample gets it, in [0, 1].
        strength: how much at most, in [0, 1]; what 1 means is told at :class:`NCPSettings`.
    """

    prob: float
    strength: float


def _same(prob: float, strength: float) -> dict[str, dict[str, float]]:
    return {name: {"prob": prob, "strength": strength} for name in OP_NAMES if name != "exchange"}


PRESETS: dict[str, dict[str, dict[str, float]]] = {
    "published": {"exchange": {"prob": 1.0, "strength": 1.0}},
    "light": {
        "stain": {"prob": 0.5, "strength": 0.4},
        "blur": {"prob": 0.3, "strength": 0.4},
        "fade": {"prob": 0.3, "strength": 0.4},
        "noise": {"prob": 0.3, "strength": 0.3},
    },
    "default": {
        "swap": {"prob": 0.2, "strength": 1.0},
        "shuffle": {"prob": 0.2, "strength": 0.7},
        "stain": {"prob": 0.5, "strength": 0.8},
        "blur": {"prob": 0.3, "strength": 0.7},
        "fade": {"prob": 0.3, "strength": 0.8},
        "cutout": {"prob": 0.2, "strength": 0.7},
        "noise": {"prob": 0.3, "strength": 0.5},
    },
    "strong": {**_same(0.5, 1.0), "swap": {"prob": 0.4, "strength": 1.0}, "shuffle": {"prob": 0.4, "strength": 1.0}},
}
"""Named choices of ops: the paper's, and ours from gentle to harsh."""

PUBLISHED_RADIUS_UM = 12.5
"""Radius of the discs that stay: 50 px at 0.25 um/px. Nucleus and the cytoplasm around it, for their ratio matters."""
PUBLISHED_RETAIN_PROB = 0.8
"""Share of the nuclei that are retained; the paper says "a part" and no number: this is our choice."""


def _number(key: str, value: Any, low: float, high: float, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}; allowed is {allowed}")
    return float(value)


def _parse_ops(ops: str | Mapping[str, Any]) -> dict[str, OpSetting]:
    """Check the choice of ops. Those that are not named are off."""
    if isinstance(ops, str):
        if ops not in PRESETS:
            raise ValueError(f"ops is {ops!r}; allowed is one of {', '.join(PRESETS)}, or a mapping of op names")
        ops = PRESETS[ops]
    if not isinstance(ops, Mapping):
        raise ValueError(f"ops is a {type(ops).__name__}; allowed is a preset's name or a mapping of op names")
    parsed = {}
    for name, setting in ops.items():
        if name not in OP_NAMES:
            raise ValueError(f"ops names an unknown op {name!r}; allowed are {', '.join(OP_NAMES)}")
        if isinstance(setting, OpSetting):
            setting = {"prob": setting.prob, "strength": setting.strength}
        if not isinstance(setting, Mapping) or set(setting) != {"prob", "strength"}:
            raise ValueError(f"ops[{name!r}] is {setting!r}; allowed is a mapping of exactly prob and strength")
        prob = _number(f"ops[{name!r}]['prob']", setting["prob"], 0.0, 1.0, "a number in [0, 1]")
        strength = _number(f"ops[{name!r}]['strength']", setting["strength"], 0.0, 1.0, "a number in [0, 1]")
        parsed[name] = OpSetting(prob, strength)
    return parsed


@dataclass
class Draw:
    """What was drawn for a batch; all tensors lie on the CPU, one row a sample.

    Args:
        seeds: (B,) int64, from which the kernels draw what fills space (noise, places of patches and rectangles).
        amounts: for every op that is on, (B,) float32: its amount, 0 where it was not drawn.
        donor: (B,) int64, the sample of the batch whose background is taken where "swap" is drawn; a batch of one has
            no donor, and "swap" is never drawn there.
    """

    seeds: Tensor
    amounts: dict[str, Tensor]
    donor: Tensor

    def active(self) -> Tensor:
        """(B,) bool: samples that at least one op acts on."""
        if not self.amounts:
            return torch.zeros(len(self.seeds), dtype=torch.bool)
        return (torch.stack(list(self.amounts.values())) > 0).any(0)

    def acts(self, name: str) -> bool:
        """Whether an op acts on any sample."""
        return name in self.amounts and bool((self.amounts[name] > 0).any())


class NCPSettings:
    """All settings of Nuclei-Centered Perturbation: the transforms and :class:`BatchedNCP` take them under these names.

    **As published** (the preset ``"published"``): discs of 12.5 micrometres around the centres of some nuclei stay, and
    all pixels outside change places with one another, fully. **Ours**: the nuclei stay with a margin around their
    outline, and what else there is is perturbed by one or several ops. Any op goes with either choice of what stays.

    What a strength of 1 means: ``exchange`` all blocks outside change places; ``blur`` a sigma of 3 micrometres;
    ``noise`` a standard deviation of 0.15 of the range; ``fade`` the colour of glass alone; ``stain`` each stain's
    density times 0.5 to 1.5 and shifted by 0.05; ``shuffle`` all patches change places, nuclei painted over; ``swap``
    the other tile's background alone; ``cutout`` three rectangles of up to 0.6 of the tile's side.

    Args:
        ops: a preset (``"published"``, ``"light"``, ``"default"``, ``"strong"``) or ``{name: {"prob": p, "strength":
            s}}``; ops that are not named are off. Names: exchange, blur, noise, fade, stain, shuffle, swap, cutout.
        margin_um: micrometres around a nucleus that are kept whole, >= 0: the nuclear border belongs to the nucleus.
            Not looked at where discs stay.
        feather_um: micrometres over which the original then passes into the perturbed, >= 0; discs have none.
        patch_um: side of the patches of ``shuffle`` in micrometres, > 0.
        prob: probability that a sample is perturbed at all, in [0, 1].
        empty: what becomes of a tile without nuclei: ``"keep"`` leaves it as it is, ``"perturb"`` perturbs all of it.
        random_amount: draw how much an op acts, 0.3 to 1.0 of its strength, uniformly; False takes its strength as it
            is. None: False with the published preset, else True.
        keep_radius_um: radius in micrometres of the discs around nuclear centres that stay, > 0; 0: no discs, but the
            nuclei with ``margin_um`` around their outline. None: 12.5 with the published preset, else 0.
        retain_prob: probability that a nucleus is retained, in [0, 1]; the others are perturbed with the rest. At least
            one of a tile's is retained. None: 0.8 with the published preset, else 1.
        block_um: side of the blocks of ``exchange`` in micrometres, >= 0; 0 and all below a pixel is one pixel (the
            paper's text), about 7 is what its figure shows.

    Raises:
        ValueError: for an unknown op or preset and for a number outside its range; the message names the key.
    """

    def __init__(
        self,
        ops: str | Mapping[str, Any] = "published",
        margin_um: float = 0.5,
        feather_um: float = 1.5,
        patch_um: float = 16.0,
        prob: float = 1.0,
        empty: str = "keep",
        random_amount: bool | None = None,
        keep_radius_um: float | None = None,
        retain_prob: float | None = None,
        block_um: float = 0.0,
    ) -> None:
        published = ops == "published"
        self.ops = _parse_ops(ops)
        self.margin_um = _number("margin_um", margin_um, 0.0, 1e3, "a number >= 0, in micrometres")
        self.feather_um = _number("feather_um", feather_um, 0.0, 1e3, "a number >= 0, in micrometres")
        self.patch_um = _number("patch_um", patch_um, 1e-3, 1e5, "a number > 0, in micrometres")
        self.block_um = _number("block_um", block_um, 0.0, 1e5, "a number >= 0, in micrometres; 0 is one pixel")
        self.prob = _number("prob", prob, 0.0, 1.0, "a number in [0, 1]")
        if empty not in ("keep", "perturb"):
            raise ValueError(f"empty is {empty!r}; allowed is 'keep' or 'perturb'")
        self.empty = empty
        self.random_amount = not published if random_amount is None else bool(random_amount)
        radius = (PUBLISHED_RADIUS_UM if published else 0.0) if keep_radius_um is None else keep_radius_um
        self.keep_radius_um = _number("keep_radius_um", radius, 0.0, 1e4, "a number >= 0, in micrometres; 0: no discs")
        retain = (PUBLISHED_RETAIN_PROB if published else 1.0) if retain_prob is None else retain_prob
        self.retain_prob = _number("retain_prob", retain, 0.0, 1.0, "a number in [0, 1]")

    @property
    def by_nucleus(self) -> bool:
        """Whether single nuclei must be known, and not only which pixels are nuclear."""
        return self.keep_radius_um > 0 or self.retain_prob < 1

    @property
    def needs_mpp(self) -> bool:
        """Whether any length is given in micrometres, so that ``mpp`` must be known."""
        around = self.keep_radius_um > 0 or self.margin_um > 0 or self.feather_um > 0
        blocks = self.block_um > 0 and "exchange" in self.ops
        return around or blocks or not _MICROMETRE_OPS.isdisjoint(self.ops)

    def perturbs(self, seeds: Tensor) -> Tensor:
        """(B,) bool on the CPU: the samples that ``prob`` chooses, for their seeds ((B,) int64)."""
        return hash_uniform(seeds.cpu(), _ACTIVE_STREAM, 1)[:, 0] < self.prob

    def draw(self, seeds: Tensor, own_donors: bool = False) -> Draw:
        """Draw what is done to each sample.

        Args:
            seeds: (B,) int64.
            own_donors: the caller gives a donor for each sample, so "swap" is possible in a batch of one too.

        Returns:
            The draw; a pure function of the seeds, sample by sample, but for ``donor``.
        """
        batch = len(seeds)
        seeds = seeds.cpu()
        streams = (_ACTIVE_STREAM, _DRAW_STREAM, _AMOUNT_STREAM, _DONOR_STREAM)
        act, chance, part, donor = hash_uniforms(seeds, streams, len(OP_NAMES)).unbind()
        part.mul_(1.0 - LEAST_PART).add_(LEAST_PART)
        on = [name for name in self.ops if name != "swap" or batch >= 2 or own_donors]
        on.sort(key=OP_NAMES.index)
        places = [OP_NAMES.index(name) for name in on]
        prob, strength = (
            torch.tensor([(self.ops[n].prob, self.ops[n].strength) for n in on], dtype=torch.float64)
            .view(-1, 2)
            .unbind(1)
        )
        drawn = (chance[:, places] < prob) & (act[:, :1] < self.prob)
        much = strength * part[:, places] if self.random_amount else strength
        amounts = dict(zip(on, torch.where(drawn, much, 0.0).to(torch.float32).unbind(1), strict=True))
        offset = 1 + (donor[:, 0] * max(batch - 1, 1)).to(torch.int64)
        donor = (torch.arange(batch) + offset) % max(batch, 1)
        return Draw(seeds, amounts, donor)

    def __repr__(self) -> str:
        ops = ", ".join(f"{name}: p={s.prob:g} s={s.strength:g}" for name, s in self.ops.items())
        disc = f"keep_radius_um={self.keep_radius_um:g}"
        stays = disc if self.keep_radius_um else f"margin_um={self.margin_um:g}, feather_um={self.feather_um:g}"
        return (
            f"NCPSettings({{{ops}}}, {stays}, retain_prob={self.retain_prob:g}, patch_um={self.patch_um:g}, "
            f"block_um={self.block_um:g}, prob={self.prob:g}, empty={self.empty!r})"
        )
