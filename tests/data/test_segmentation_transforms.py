from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from e3va_cli.data.collate import collate
from e3va_cli.data.dataset import Target
from e3va_cli.data.segmentation_transforms import (
    PhotometricDistortion,
    RandomCrop,
    RandomScale,
    SegmentationTransforms,
)

Sample = tuple[tv_tensors.Image, Target]


def transforms(**keys: Any) -> SegmentationTransforms:
    return SegmentationTransforms(
        **{
            "short_side": 40,
            "max_size": 160,
            "scales": [0.5, 2.0],
            "crop_size": 48,
            "cat_max_ratio": 0.75,
            "flip": 0.5,
            "photometric_distortion": False,
            **keys,
        }
    )


def sample(labels: Tensor) -> Sample:
    """An image whose every channel is 10 times the label."""
    image = tv_tensors.Image((10 * labels).to(torch.uint8).expand(3, -1, -1).clone())
    target = {"image_id": 7, "semantic": tv_tensors.Mask(labels.to(torch.int16)), "original_size": tuple(labels.shape)}
    return image, target


def blocks(height: int, width: int, side: int) -> Tensor:
    """Squares of the labels 0..24 at random."""
    coarse = torch.randint(25, (-(-height // side), -(-width // side)))
    return coarse.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]


def flat(image: Tensor) -> Tensor:
    """The pixels [H, W] around which all are equal, so that no interpolation has mixed them."""
    pixels = image[:1].float()[None]
    window = {"kernel_size": 3, "stride": 1, "padding": 1}
    largest, least = (torch.nn.functional.max_pool2d(sign * pixels, **window) * sign for sign in (1, -1))
    return (largest == least)[0, 0]


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (75, 75)])
def test_the_mask_follows_the_image(size: tuple[int, int]) -> None:
    train = transforms(short_side=60, max_size=240).train_transforms()
    sizes = set()
    for _ in range(40):
        image, target = train(*sample(blocks(*size, side=15)))
        labels = target["semantic"]
        assert type(image) is type(labels) is Tensor
        assert image.dtype == torch.uint8 and labels.dtype == torch.int16
        assert image.shape == (3, *labels.shape)
        assert target["image_id"] == 7 and target["original_size"] == size
        sure = flat(image)
        assert sure.sum() > 150
        assert torch.equal(image[0][sure].int(), 10 * labels[sure].int())
        sizes.add(labels.shape)
    assert len(sizes) > 5 and max(max(shape) for shape in sizes) == 48


def test_flip_is_of_both_and_left_to_right() -> None:
    labels = torch.arange(48).expand(40, 48) % 25
    keys = {"short_side": 40, "scales": [1.0, 1.0], "cat_max_ratio": 1.0}
    image, target = transforms(flip=1.0, **keys).train_transforms()(*sample(labels))
    assert torch.equal(target["semantic"], labels.flip(1).to(torch.int16))
    assert torch.equal(image[2].int(), 10 * labels.flip(1).int())
    image, target = transforms(flip=0.0, **keys).train_transforms()(*sample(labels))
    assert torch.equal(target["semantic"], labels.to(torch.int16))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((50, 100), (40, 80)),
        ((100, 50), (80, 40)),  # upright images by their short side, too
        ((10, 100), (16, 160)),  # the long side binds
        ((100, 10), (160, 16)),
        ((1, 400), (1, 160)),
        ((77, 77), (40, 40)),  # 40 / 77 * 77 is a little less than 40
    ],
)
def test_scale_of_one(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image, target = RandomScale(40, 160, [1.0, 1.0])(*sample(torch.ones(size)))
    assert image.shape == (3, *expected) and target["semantic"].shape == expected
    assert (image == 10).all() and (target["semantic"] == 1).all()


def test_scales_fill_their_range_evenly() -> None:
    scale = RandomScale(400, 1600, [0.5, 2.0])
    sides = torch.tensor([scale.make_params([torch.zeros(3, 20, 30)])["size"][0] / 400 for _ in range(2000)])
    assert 0.5 <= sides.min() < 0.52 and 1.98 < sides.max() <= 2.0
    assert abs(sides.mean() - 1.25) < 0.05 and abs(sides.std() - 1.5 / 12**0.5) < 0.03


def test_crop_places() -> None:
    """Every place is as likely as any other, and the labels come from where the pixels come from."""
    labels = torch.arange(1, 26).reshape(5, 5)
    crop = RandomCrop(3, 0.75)
    corners = []
    for _ in range(900):
        image, target = crop(*sample(labels))
        assert target["semantic"].shape == (3, 3)
        assert torch.equal(image[1].int(), 10 * target["semantic"].int())
        corners.append(int(target["semantic"][0, 0]))
        assert torch.equal(target["semantic"] - corners[-1], labels[:3, :3].to(torch.int16) - 1)
    counts = torch.bincount(torch.tensor(corners))
    assert counts.nonzero().flatten().tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert counts[counts > 0].min() > 60


@pytest.mark.parametrize("size", [(20, 30), (20, 100), (100, 20), (48, 48)])
def test_a_side_shorter_than_the_crop_stays_whole(size: tuple[int, int]) -> None:
    image, target = RandomCrop(48, 1.0)(*sample(torch.ones(size)))
    assert image.shape[1:] == target["semantic"].shape == (min(size[0], 48), min(size[1], 48))
    assert (target["semantic"] == 1).all()


def share(labels: Tensor) -> float:
    counts = torch.unique(labels[labels > 0], return_counts=True)[1]
    return float(counts.max() / counts.sum())


def shares(crop: Callable[..., Sample], labels: Tensor) -> list[float]:
    return [share(crop(*sample(labels))[1]["semantic"]) for _ in range(150)]


def test_one_class_does_not_cover_too_much() -> None:
    labels = torch.ones(60, 120)
    labels[:, 80:] = 2
    labels[:30] = 0  # does not count
    free, limited = (shares(RandomCrop(40, limit), labels) for limit in (1.0, 0.75))
    over_free, over_limited = (sum(value > 0.75 for value in values) for values in (free, limited))
    assert over_free > 90  # 60 of 81 places
    assert over_limited < 25  # ten such places in a row: one time in twenty


def test_the_limit_itself_is_allowed() -> None:
    labels = torch.ones(4, 100)
    labels[:, 75:] = 2
    torch.manual_seed(0)
    crop = RandomCrop(100, 0.75)
    assert crop._is_varied(labels.short()) and not RandomCrop(100, 0.74)._is_varied(labels.short())
    assert not crop._is_varied(torch.zeros(4, 4).short())


def test_a_crop_with_labels_is_preferred() -> None:
    labels = torch.zeros(40, 400)
    labels[:, :100], labels[:20, :100] = 1, 2
    crop = RandomCrop(40, 0.75)
    found = sum(bool(crop(*sample(labels))[1]["semantic"].any()) for _ in range(100))
    assert found > 85  # a third of the places, so all but 2 % of ten tries


def test_one_class_alone_is_taken_as_it_is() -> None:
    image, target = RandomCrop(8, 0.75)(*sample(torch.full((20, 20), 3)))
    assert image.shape == (3, 8, 8) and (target["semantic"] == 3).all()


def test_distortion_is_of_the_image_alone() -> None:
    labels = blocks(40, 40, 5)
    changed = 0
    for _ in range(30):
        image, target = sample(labels)
        distorted, same = PhotometricDistortion()(image, target)
        assert distorted.dtype == torch.uint8 and distorted.shape == image.shape
        assert torch.equal(same["semantic"], target["semantic"])
        changed += not torch.equal(distorted, image)
    assert changed > 20


def test_channels_are_not_permuted_and_hue_turns_by_a_tenth_at_most() -> None:
    image = tv_tensors.Image(torch.tensor([200, 60, 60], dtype=torch.uint8)[:, None, None].expand(3, 8, 8).clone())
    for _ in range(200):
        red, green, blue = PhotometricDistortion()(image)[:, 0, 0].tolist()
        assert red >= max(green, blue)  # a hue of 0, and up to 36 degrees to either side
    hues = [PhotometricDistortion().make_params([image])["hue_factor"] for _ in range(400)]
    drawn = [hue for hue in hues if hue is not None]
    assert 150 < len(drawn) < 250
    assert -0.1 <= min(drawn) < -0.09 and 0.09 < max(drawn) <= 0.1


def test_photometric_distortion_is_optional() -> None:
    labels = blocks(40, 40, 5)
    keys = {"short_side": 40, "scales": [1.0, 1.0], "flip": 0.0}
    image, _ = sample(labels)
    for _ in range(10):
        assert torch.equal(
            transforms(photometric_distortion=False, **keys).train_transforms()(*sample(labels))[0], image
        )
    images = [transforms(photometric_distortion=True, **keys).train_transforms()(*sample(labels))[0] for _ in range(10)]
    assert sum(not torch.equal(other, image) for other in images) > 5


def test_the_seed_decides() -> None:
    train = transforms(photometric_distortion=True).train_transforms()
    picture = sample(blocks(70, 90, 10))

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        drawn = [train(*picture) for _ in range(4)]
        return [image for image, _ in drawn] + [target["semantic"] for _, target in drawn]

    one, again, other = draw(3), draw(3), draw(4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_input_is_left_alone() -> None:
    image, target = sample(blocks(60, 60, 10))
    copies = image.clone(), target["semantic"].clone()
    for _ in range(5):
        transforms(photometric_distortion=True).train_transforms()(image, target)
    assert torch.equal(image, copies[0]) and torch.equal(target["semantic"], copies[1])


def test_small_images_are_padded_by_the_batch() -> None:
    """The batch knows what is padding, so that the model can make it the mean color."""
    train = transforms(crop_size=64, scales=[0.5, 0.5]).train_transforms()
    small, large = train(*sample(torch.ones(40, 60))), transforms(crop_size=64, scales=[2, 2]).train_transforms()
    batch = collate([small, large(*sample(torch.ones(40, 60)))])
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.image_sizes == [(20, 30), (64, 64)]
    assert batch.targets[0]["semantic"].shape == (20, 30)


def test_evaluation_resizes_the_image_alone() -> None:
    image, target = transforms().val_transforms()(*sample(blocks(50, 100, 10)))
    assert image.shape == (3, 40, 80) and type(image) is Tensor
    assert target["semantic"].shape == (50, 100) and type(target["semantic"]) is Tensor
    assert transforms(max_size=60).val_transforms()(*sample(blocks(50, 100, 10)))[0].shape == (3, 30, 60)


def test_largest_image() -> None:
    assert transforms(crop_size=96).largest_image == (96, 96)
