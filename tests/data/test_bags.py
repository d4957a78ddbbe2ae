import h5py
import numpy as np
import pytest
import torch

from cytossl_monai.data.bags.dataset import BagDataset, collate_bags, feature_statistics
from cytossl_monai.data.bags.features import write_features
from cytossl_monai.data.bags.items import bag_encoder, bag_items, encode_targets
from cytossl_monai.data.bags.sampler import BagBatchSampler
from cytossl_monai.data.bags.transforms import RandTileDropoutd, RandTileSampled
from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.engines.mil.trainer import bag_loader
from cytossl_monai.utils.errors import FeatureError, TableError


def record(name, label="a", patient=None):
    return SlideRecord(name, name, label, patient or name)


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    for i, n in enumerate((5, 9, 2, 7)):
        x = rng.standard_normal((n, 4)).astype("f4")
        write_features(
            tmp_path / f"s{i}.h5", x, np.arange(2 * n).reshape(n, 2), {"encoder": "e1", "encoder_name": "vit"}
        )
    return tmp_path


def items_of(store, labels="abab"):
    return bag_items([record(f"s{i}", c) for i, c in enumerate(labels)], store)


def test_items_and_batch(store):
    items = items_of(store)
    assert [i["label"] for i in items] == [0, 1, 0, 1]
    known = {"hash": "e1", "name": "vit", "dim": 4}
    assert bag_encoder(items).items() >= known.items()
    dataset = BagDataset(items)
    assert dataset.sizes() == [5, 9, 2, 7]
    batch = collate_bags([dataset[1], dataset[2]])
    assert batch["features"].shape == (2, 9, 4)
    assert batch["mask"].sum(1).tolist() == [9, 2]
    assert (batch["features"][1, 2:] == 0).all()
    assert (batch["coords"][1, 2:] == -1).all()
    assert batch["label"].tolist() == [1, 0]
    with h5py.File(store / "s1.h5") as file:
        np.testing.assert_array_equal(batch["features"][0].numpy(), file["features"][()])


def test_slides_without_features_are_left_out_with_a_warning(store, caplog):
    items = bag_items([record("s0"), record("s1", "b"), record("gone", "b")], store)
    assert [i["slide_id"] for i in items] == ["s0", "s1"]
    assert "gone" in caplog.text
    with pytest.raises(FeatureError, match="none of the 1 slides"):
        bag_items([record("gone")], store)


def test_two_classes_of_which_none_is_known_as_negative_are_told(store, caplog):
    items_of(store, ["HSIL", "NILM", "HSIL", "NILM"])
    assert not caplog.text
    assert items_of(store, ["cancer", "inflammation"] * 2)[0]["label"] == 0
    assert "cancer is taken for it: else say --classes \"['inflammation','cancer']\"" in caplog.text


def test_bags_of_another_encoder_are_refused(store):
    write_features(store / "s1.h5", np.ones((3, 4), "f4"), np.zeros((3, 2), int), {"encoder": "e2"})
    with pytest.raises(FeatureError, match=r"s1\.h5 was made by the encoder e2.*by e1"):
        bag_encoder(items_of(store))
    dataset = BagDataset(items_of(store), encoder={"hash": "e1", "dim": 4, "name": "vit"})
    with pytest.raises((FeatureError, RuntimeError), match="e2, not by e1"):
        dataset[1]
    write_features(store / "s1.h5", np.ones((3, 6), "f4"), np.zeros((3, 2), int), {"encoder": "e1"})
    with pytest.raises(FeatureError, match="6 features a tile, 4 are expected"):
        dataset[1]


def test_nan_and_empty_bags_are_refused(store):
    with h5py.File(store / "s0.h5", "r+") as file:
        file["features"][0, 0] = np.nan
    with pytest.raises(FeatureError, match="NaN"):
        BagDataset(items_of(store))[0]
    bag = {"slide_id": "x", "features": torch.zeros(0, 4), "coords": torch.zeros(0, 2)}
    with pytest.raises(FeatureError, match="x is an empty bag"):
        collate_bags([bag])


def test_targets():
    rows = [record("1", "hsil|candida"), record("2", "none"), record("3", "candida")]
    labels, classes = encode_targets(rows, "multilabel")
    assert classes == ["candida", "hsil"]
    assert labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    with pytest.raises(TableError, match="'hsil', which is none of"):
        encode_targets(rows, "multilabel", ["candida"])
    with pytest.raises(TableError, match="finding is written in two ways, 'candida' and 'Candida'"):
        encode_targets([*rows, record("4", "Candida|hsil")], "multilabel")
    with pytest.raises(TableError, match="at least two classes"):
        encode_targets([record("1"), record("2")])
    with pytest.raises(TableError, match="none of the classes"):
        encode_targets([record("1", "odd")], classes=["a", "b"])
    with pytest.raises(ValueError, match="lowest grade first"):
        encode_targets(rows, "ordinal")
    grades, _ = encode_targets([record("1", "hsil"), record("2", "nilm")], "ordinal", ["nilm", "lsil", "hsil"])
    assert grades.tolist() == [2, 0]


def test_tile_dropout_and_sampling_keep_rows_together():
    x = torch.arange(100.0)[:, None]
    item = {"features": x, "coords": torch.arange(100)[:, None].repeat(1, 2)}
    sampled = RandTileSampled(10).set_random_state(0)
    dropped = RandTileDropoutd(0.5).set_random_state(0)
    sizes = set()
    for _ in range(30):
        a, b = sampled(item), dropped(item)
        assert len(a["features"]) == 10
        assert 50 <= len(b["features"]) <= 100
        sizes.add(len(b["features"]))
        for kept in (a, b):
            assert torch.equal(kept["features"][:, 0].long(), kept["coords"][:, 0])
    assert len(sizes) > 5
    single = {"features": x[:1], "coords": item["coords"][:1]}
    assert len(dropped(single)["features"]) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_draws_other_tiles_whoever_reads_them(tmp_path, num_workers):
    rng = np.random.default_rng(0)
    for i in range(4):
        write_features(
            tmp_path / f"s{i}.h5", rng.standard_normal((40, 4)).astype("f4"), np.arange(80).reshape(40, 2), {}
        )
    items = items_of(tmp_path)
    epochs = []
    for workers in (num_workers, 0):
        dataset = BagDataset(items, transform=RandTileSampled(5))
        loader = bag_loader(dataset, 2, training=True, balanced=False, num_workers=workers, seed=3)
        epochs.append([{s: c for b in loader for s, c in zip(b["slide_id"], b["coords"])} for _ in range(3)])
    for first, second in zip(*epochs):
        assert all(torch.equal(first[slide], second[slide]) for slide in first), "the number of workers matters"
    drawn = [tuple(epoch[slide][:, 0].tolist()) for epoch in epochs[0] for slide in sorted(epoch)]
    assert len(set(drawn)) == len(drawn), "a slide's tiles are those of another epoch or slide"


def test_sampler_shows_every_bag_once_and_bounds_batches():
    sizes = np.random.default_rng(0).integers(1, 2000, 101)
    sampler = BagBatchSampler(sizes, batch_size=8, max_tiles=6000)
    epochs = [list(sampler) for _ in range(2)]
    assert epochs[0] != epochs[1]
    for batches in epochs:
        assert sorted(i for b in batches for i in b) == list(range(101))
        assert all(len(b) <= 8 and sizes[b].max() * len(b) <= 6000 for b in batches)
    again = BagBatchSampler(sizes, batch_size=8, max_tiles=6000)
    assert list(again) == epochs[0]


def test_buckets_waste_less_than_random_batches():
    sizes = np.random.default_rng(0).integers(100, 10000, 200)

    def waste(batches):
        return 1 - sizes.sum() / sum(sizes[b].max() * len(b) for b in batches)

    order = np.random.default_rng(1).permutation(200)
    random = [order[i : i + 8] for i in range(0, 200, 8)]
    assert waste(list(BagBatchSampler(sizes, 8, max_tiles=10**9))) < 0.6 * waste(random)


def test_balanced_sampler_draws_classes_alike():
    labels = [0] * 36 + [1] * 4
    sampler = BagBatchSampler([10] * 40, 4, labels, balanced=True)
    drawn = [i for b in sampler for i in b]
    assert len(drawn) == 40
    share = np.mean([labels[i] for i in drawn])
    assert 0.45 <= share <= 0.55
    assert set(drawn) >= {36, 37, 38, 39}


def test_feature_statistics_weigh_slides_alike(store):
    dataset = BagDataset(items_of(store))
    mean, std = feature_statistics(dataset)
    bags = [dataset[i]["features"] for i in range(4)]
    torch.testing.assert_close(mean, torch.stack([b.mean(0) for b in bags]).mean(0))
    power = torch.stack([b.square().mean(0) for b in bags]).mean(0)
    torch.testing.assert_close(std, (power - mean.square()).sqrt())
    dropping = BagDataset(items_of(store), lambda item: {**item, "features": item["features"][:1]})
    torch.testing.assert_close(feature_statistics(dropping), (mean, std))  # transforms are left out
    assert len(dropping[0]["features"]) == 1
