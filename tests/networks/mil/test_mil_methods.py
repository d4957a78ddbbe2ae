"""Properties that every multiple-instance method must have."""

import inspect
import json

import pytest
import torch

from cytossl_monai.networks.build import build_network, network_config
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.clam import CLAM
from cytossl_monai.networks.mil.cytology.discriminant import CellDiscriminant
from cytossl_monai.networks.mil.cytology.less import LESS
from cytossl_monai.networks.mil.cytology.reference import ReferenceBank
from cytossl_monai.networks.mil.cytology.svdd import DeepSVDD
from cytossl_monai.networks.mil.dsmil import DSMIL
from cytossl_monai.networks.mil.dtfd import DTFDMIL
from cytossl_monai.networks.mil.ensemble import MILEnsemble
from cytossl_monai.networks.mil.monai_heads import MONAIHead, MONAIPyramidHead
from cytossl_monai.networks.mil.pooling import MaxMIL, MeanMIL
from cytossl_monai.networks.mil.targets import MILLoss
from cytossl_monai.networks.mil.transmil import TransMIL

METHODS = {
    "mean": lambda k: MeanMIL(12, k),
    "max": lambda k: MaxMIL(12, k),
    "abmil": lambda k: ABMIL(12, k, gated=False),
    "abmil_gated": lambda k: ABMIL(12, k),
    "dsmil": lambda k: DSMIL(12, k),
    "clam_sb": lambda k: CLAM(12, k),
    "clam_mb": lambda k: CLAM(12, k, multi_branch=True, instance_loss="ce"),
    "transmil": lambda k: TransMIL(12, k, embed_dim=32, n_landmarks=8),
    "dtfd_afs": lambda k: DTFDMIL(12, k),
    "dtfd_maxmin": lambda k: DTFDMIL(12, k, distillation="maxmin"),
    "dtfd_max": lambda k: DTFDMIL(12, k, n_pseudo=3, distillation="max"),
    "less": lambda k: LESS(12, k, embed_dim=32),
    "att_trans": lambda k: MONAIHead(12, k, embed_dim=32),
    "att_trans_pyramid": lambda k: MONAIPyramidHead(12, k),
    "ensemble": lambda k: MILEnsemble([ABMIL(12, k), MeanMIL(12, k)], "multiclass", [1.0, 2.0]),
}


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


def bags():
    features = torch.randn(3, 23, 12)
    mask = torch.arange(23) < torch.tensor([23, 9, 1])[:, None]
    return features, mask


def test_padding_never_changes_a_result(make):
    model = make(3).eval()
    features, mask = bags()
    poisoned = features.masked_fill(~mask[..., None], float("nan"))
    together = model(poisoned, mask)
    for b, n in enumerate((23, 9, 1)):
        alone = model(features[b : b + 1, :n])
        torch.testing.assert_close(together.logits[b], alone.logits[0], atol=1e-5, rtol=1e-4)
        if alone.attention is not None:
            torch.testing.assert_close(together.attention[b, :n], alone.attention[0], atol=1e-5, rtol=1e-4)
        if alone.scores is not None:
            torch.testing.assert_close(together.scores[b, :n], alone.scores[0], atol=1e-5, rtol=1e-4)
            assert (together.scores[b, n:] == 0).all()


def test_attention_sums_to_one_and_is_zero_on_padding(make):
    output = make(3).eval()(*bags())
    _, mask = bags()
    assert output.attention is not None
    assert (output.attention >= 0).all()
    assert (output.attention[~mask] == 0).all()
    torch.testing.assert_close(output.attention.sum(dim=1), torch.ones(3))
    if output.class_attention is not None:
        torch.testing.assert_close(output.class_attention.sum(dim=2), torch.ones(3, 3))


def test_order_matters_only_where_the_method_says_so(make):
    model = make(2).eval()
    features = torch.randn(1, 50, 12)
    order = torch.randperm(50)
    one, other = model(features), model(features[:, order])
    same = torch.allclose(one.logits, other.logits, atol=1e-5)
    if model.order_matters:
        return
    assert same
    torch.testing.assert_close(one.attention[:, order], other.attention, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["transmil", "dtfd_afs"])
def test_methods_that_say_order_matters_are_right(name):
    model = METHODS[name](2).eval()
    features = torch.randn(1, 50, 12)
    assert model.order_matters
    assert not torch.allclose(model(features).logits, model(features[:, torch.randperm(50)]).logits, atol=1e-6)


def test_one_tile(make):
    output = make(2).eval()(torch.randn(2, 1, 12))
    assert torch.isfinite(output.logits).all()
    torch.testing.assert_close(output.attention, torch.ones(2, 1))


def test_training_on_one_tile_bags_gives_finite_gradients(make):
    model = make(2).train()
    loss = MILLoss(model)(model(torch.randn(2, 1, 12)), torch.tensor([0, 1]))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("target", ["multiclass", "ordinal", "multilabel"])
def test_gradients_reach_every_parameter(make, target):
    model = make(3).train()
    if isinstance(model, MILEnsemble) and target != "multiclass":
        pytest.skip("this ensemble was made for multiclass")
    features, mask = bags()
    labels = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0]]) if target == "multilabel" else torch.tensor([0, 1, 2])
    if target == "ordinal":
        labels = torch.tensor([3, 1, 2])
    seen = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    silent = list(seen)
    for _ in range(4):  # dropout may silence a unit in one pass
        model.zero_grad()
        MILLoss(model, target)(model(features, mask), labels).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            seen[name] += parameter.grad.abs()
        silent = [name for name, total in seen.items() if not (total > 0).any()]
        if not silent:
            break
    assert not silent


def test_config_rebuilds_the_network(make):
    model = make(3).eval()
    model.set_standardisation(torch.randn(12), torch.rand(12) + 0.5)
    again = build_network(network_config(model)).eval()
    again.load_state_dict(model.state_dict())
    features, mask = bags()
    torch.testing.assert_close(again(features, mask).logits, model(features, mask).logits)


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        (MeanMIL, {"embed_dim": 0, "dropout": 0.5}),
        (MaxMIL, {"embed_dim": 0, "dropout": 0.5}),
        (ABMIL, {"embed_dim": 8, "attention_dim": 4, "gated": False, "dropout": 0.5, "feature_dropout": 0.0}),
        (DSMIL, {"embed_dim": 8, "query_dim": 4, "dropout": 0.5, "stream_weight": 0.1}),
        (
            CLAM,
            {"multi_branch": True, "embed_dim": 8, "attention_dim": 4, "dropout": 0.5, "n_sampled": 2}
            | {"instance_weight": 0.1, "instance_loss": "ce", "exclusive": False},
        ),
        (TransMIL, {"embed_dim": 16, "n_heads": 2, "n_landmarks": 4, "dropout": 0.5}),
        (
            DTFDMIL,
            {"n_pseudo": 2, "distillation": "max", "embed_dim": 8, "attention_dim": 4, "dropout": 0.5}
            | {"tier1_weight": 0.1},
        ),
        (
            LESS,
            {"embed_dim": 8, "n_heads": 2, "n_blocks": 1, "depths": [1, 2], "mlp_ratio": 1.0, "dropout": 0.5}
            | {"feature_scales": 2},
        ),
        (DeepSVDD, {"embed_dim": 8, "hidden_dim": 4, "top_share": 0.5, "momentum": 0.5}),
        (
            CellDiscriminant,
            {"positive_share": 0.2, "rounds": 2, "top_share": 0.5, "slide_scatter": 1.0, "shrinkage": 0.5},
        ),
        (ReferenceBank, {"n_neighbours": 2, "top_share": 0.5, "bank_size": 30, "shrinkage": 0.5}),
        (MONAIHead, {"embed_dim": None, "trans_blocks": 1, "trans_dropout": 0.5}),
        (MONAIPyramidHead, {"trans_blocks": 2, "trans_dropout": 0.5}),
    ],
)
def test_config_holds_every_argument(network, arguments):
    """Arguments other than the defaults: one that is forgotten would come back as its default."""
    arguments = {"in_features": 16, "n_outputs": 2, **arguments}
    assert set(arguments) == set(inspect.signature(network).parameters)
    config = network(**arguments).config
    assert json.loads(json.dumps(config)) == arguments


def test_a_network_that_forgets_an_argument_is_named():
    class Forgetful(MeanMIL):
        def __init__(self, in_features, n_outputs, sharpness=1.0):
            super().__init__(in_features, n_outputs)

    with pytest.raises(NotImplementedError, match="Forgetful does not keep sharpness"):
        network_config(Forgetful(4, 2))


def test_standardisation_is_inside(make):
    model = make(2).eval()
    if isinstance(model, MILEnsemble):
        pytest.skip("members standardise")
    features = torch.randn(2, 7, 12)
    wanted = model(features).logits
    mean, std = torch.randn(12), torch.rand(12) + 0.5
    model.set_standardisation(mean, std)
    torch.testing.assert_close(model(features * std + mean).logits, wanted, atol=1e-4, rtol=1e-4)


def test_wrong_width_is_refused(make):
    with pytest.raises(ValueError, match=r"\(B, N, 12\)"):
        make(2)(torch.randn(1, 4, 13))


def test_learns_a_needle_in_a_haystack(make):
    """Positive bags hold two tiles of another kind: a classifier worth its name fits that."""
    torch.manual_seed(1)
    model = make(2)
    heavy = isinstance(model, MONAIPyramidHead)  # 80 million weights: two steps must lower its loss
    features = torch.randn(4 if heavy else 16, 8 if heavy else 20, 12)
    labels = torch.arange(len(features)) % 2
    features[labels == 1, :2] += 3.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if heavy else 1e-3)
    loss, first = MILLoss(model), torch.tensor(0.0)
    for step in range(3 if heavy else 30):
        optimizer.zero_grad()
        value = loss(model.train()(features), labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        first = value.detach() if step == 0 else first
    if heavy:
        assert value < first
    else:
        right = (model.eval()(features).logits.argmax(dim=1) == labels).float().mean()
        assert right >= 0.9


@pytest.mark.parametrize("distillation", ["afs", "maxmin", "max"])
def test_the_second_tier_of_dtfd_does_not_train_the_embedding(distillation: str) -> None:
    """Two optimisers in the published training: tier 2's holds its own attention and classifier alone."""
    model = DTFDMIL(12, 2, distillation=distillation)
    output = model(torch.randn(2, 9, 12))
    output.logits.sum().backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched <= {"score2", "tier2"}
    model.auxiliary_losses(output, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))["tier1"].backward()
    assert model.embed[0].weight.grad is not None
