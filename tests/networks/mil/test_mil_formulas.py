"""Formulas against naive versions, and MONAI's own head against ours."""

import math
from types import SimpleNamespace

import torch
from monai.networks.nets import MILModel as MONAIMILModel, milmodel as monai_milmodel
from torch import nn

from cytossl_monai.networks.blocks.nystrom import NystromAttention, iterative_pinv
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.clam import CLAM, smooth_top1_svm
from cytossl_monai.networks.mil.dsmil import DSMIL
from cytossl_monai.networks.mil.dtfd import DTFDMIL
from cytossl_monai.networks.mil.monai_heads import MONAIHead, MONAIPyramidHead
from cytossl_monai.networks.mil.pooling import MaxMIL, MeanMIL


def test_gated_abmil_is_the_papers_formula():
    model = ABMIL(6, 2, embed_dim=5, attention_dim=4).eval()
    x = torch.randn(1, 9, 6)
    h = [torch.relu(model.embed[1].weight @ t + model.embed[1].bias) for t in x[0]]
    s = model.score
    raw = [
        s.weight.weight[0]
        @ (torch.tanh(s.value.weight @ t + s.value.bias) * torch.sigmoid(s.gate.weight @ t + s.gate.bias))
        for t in h
    ]
    e = [math.exp(float(r.detach())) for r in raw]
    a = [v / sum(e) for v in e]
    z = sum(w * t for w, t in zip(a, h))
    output = model(x)
    torch.testing.assert_close(output.logits[0], model.classifier(z))
    torch.testing.assert_close(output.attention[0], torch.tensor(a))
    torch.testing.assert_close((output.attention.unsqueeze(-1) * output.scores).sum(1), output.logits)


def test_mean_and_max():
    mean, maximum = MeanMIL(6, 2).eval(), MaxMIL(6, 3).eval()
    x = torch.randn(1, 9, 6)
    tiles = mean(x).scores[0]
    torch.testing.assert_close(mean(x).logits[0], tiles.mean(0))  # the classifier is linear
    single = torch.stack([maximum(x[:, i : i + 1]).logits[0] for i in range(9)])
    torch.testing.assert_close(maximum(x).logits[0], single.max(0).values)


def test_dsmil_naive():
    model = DSMIL(6, 3, embed_dim=8, query_dim=4).eval()
    x = torch.randn(1, 9, 6)
    h = model.embed(x)[0]
    s = model.tile_classifier(h)
    bags, tops = [], []
    for k in range(3):
        m = int(s[:, k].argmax())
        q = [model.query(t) for t in h]
        weight = torch.softmax(torch.stack([t @ q[m] / 2.0 for t in q]), 0)
        bags.append((weight[:, None] * model.value(h)).sum(0))
        tops.append(s[m, k])
    wanted = 0.5 * (model.bag_classifier(torch.cat(bags)) + torch.stack(tops))
    torch.testing.assert_close(model(x).logits[0], wanted)


def test_clam_multi_branch_uses_a_classifier_for_each_branch():
    model = CLAM(6, 3, multi_branch=True).eval()
    x = torch.randn(1, 9, 6)
    output = model(x)
    h = model.embed(x)[0]
    for k in range(3):
        bag = (output.class_attention[0, k][:, None] * h).sum(0)
        torch.testing.assert_close(output.logits[0, k], model.classifier(bag)[k])


def test_clam_instance_loss_naive():
    model = CLAM(6, 2, n_sampled=3, instance_loss="ce", instance_weight=1.0, dropout=0.0).train()
    x = torch.randn(2, 9, 6)
    output = model(x)
    labels = [1, 0]
    terms = []
    for b, label in enumerate(labels):
        order = output.attention[b].argsort(descending=True).tolist()
        logits = model.instance_classifier(model.embed(x[b])).view(9, 2, 2)
        on = [(i, 1) for i in order[:3]] + [(i, 0) for i in order[-3:]]
        off = [(i, 0) for i in order[:3]]
        for k, pairs in ((label, on), (1 - label, off)):
            terms.append(torch.stack([-torch.log_softmax(logits[i, k], 0)[y] for i, y in pairs]).mean())
    got = model.auxiliary_losses(output, torch.eye(2)[labels])["instance"]
    torch.testing.assert_close(got, torch.stack(terms).mean())


def test_smooth_svm_tends_to_the_hinge():
    logits, labels = torch.randn(20, 2), torch.randint(0, 2, (20,))
    wrong = logits[torch.arange(20), 1 - labels]
    right = logits[torch.arange(20), labels]
    hinge = torch.relu(1 + wrong - right).mean()
    torch.testing.assert_close(smooth_top1_svm(logits, labels, tau=1e-4), hinge, atol=1e-3, rtol=1e-3)


def test_dtfd_with_one_pseudo_bag_distils_the_bag_itself():
    model = DTFDMIL(6, 2, n_pseudo=1).eval()
    x = torch.randn(1, 9, 6)
    h = model.embed(x)
    attention = torch.softmax(model.score(h).squeeze(-1), 1)
    bag = (attention.unsqueeze(-1) * h).sum(1)
    torch.testing.assert_close(model(x).logits, model.tier2(bag))
    torch.testing.assert_close(model(x).extra["tier1_logits"][:, 0], model.tier1(bag))


def test_dtfd_deals_every_tile_once():
    for training in (True, False):
        model = DTFDMIL(6, 2, n_pseudo=4).train(training)
        mask = torch.arange(11) < torch.tensor([11, 3])[:, None]
        dealt = model._deal(mask)
        assert torch.equal(dealt.sum(1).bool(), mask)
        assert (dealt.sum(1) <= 1).all()
        sizes = dealt.sum(2)
        assert int(sizes[0].max() - sizes[0].min()) <= 1


def test_nystrom_with_all_tokens_as_landmarks_is_attention():
    layer = NystromAttention(16, 2, n_landmarks=64, pinv_iterations=30, residual_kernel=0, dropout=0.0).double().eval()
    tokens = torch.randn(1, 12, 16, dtype=torch.float64)
    got, _ = layer(tokens, torch.ones(1, 12, dtype=torch.bool))
    q, k, v = layer.qkv(tokens[0]).view(12, 3, 2, 8).permute(1, 2, 0, 3)
    exact = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
    exact = layer.out(exact.transpose(0, 1).reshape(12, 16))
    torch.testing.assert_close(got[0], exact, atol=1e-6, rtol=1e-5)


def test_iterative_pinv_against_torch():
    matrix = torch.softmax(3 * torch.randn(2, 10, 10, dtype=torch.float64), -1)
    torch.testing.assert_close(iterative_pinv(matrix, 40), torch.linalg.pinv(matrix), atol=1e-5, rtol=1e-5)


def test_att_trans_equals_monai():
    model = MONAIHead(16, 2, embed_dim=None, trans_blocks=2).eval()
    reference = MONAIMILModel(2, "att_trans", backbone=nn.Identity(), backbone_num_features=16, trans_blocks=2).eval()
    reference.load_state_dict(model.head.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(model(x).logits, reference.calc_head(x), atol=1e-5, rtol=1e-4)


class _Trunk(nn.Module):
    """Stands where MONAI puts its ResNet-50: only the names that the constructor touches."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Identity() for _ in range(4))
        self.fc = nn.Linear(2048, 1)


def test_att_trans_pyramid_equals_monai(monkeypatch):
    monkeypatch.setattr(monai_milmodel, "models", SimpleNamespace(resnet50=lambda weights: _Trunk()))
    reference = MONAIMILModel(2, "att_trans_pyramid", pretrained=False, trans_blocks=1).eval()
    model = MONAIPyramidHead(3840, 2, trans_blocks=1).eval()
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("net.")}
    missing = model.load_state_dict({**model.state_dict(), **weights})
    assert not missing.unexpected_keys
    x = torch.randn(1, 5, 3840)
    for i, part in enumerate(x.split([256, 512, 1024, 2048], -1)):
        reference.extra_outputs[f"layer{i + 1}"] = part.reshape(5, -1, 1, 1)
    torch.testing.assert_close(model(x).logits, reference.calc_head(torch.zeros(1, 5, 1)), atol=1e-4, rtol=1e-4)
