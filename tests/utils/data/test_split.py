"""The split by names: stable when images come and go, never empty, never uneven."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.images import ImageFiles
from utils.data.split import (
    apply_split, describe, is_held_out, new_split, numbers_of_names, sides, train_validation_split,
)
from utils.errors import UserError


def images(names, root="photos"):
    """A dataset of files of these names, which are not read."""
    return ImageFiles("custom", 8, 3, root, [(name, 1, 1) for name in sorted(names)])


def names_of(dataset, held_out):
    return {dataset.identifier(int(index)) for index in np.flatnonzero(held_out)}


def split(dataset):
    """The whole split of a new run, as a checkpoint keeps it."""
    return apply_split(dataset, new_split(dataset))[2]


@settings(max_examples=80, deadline=None)
@given(st.sets(st.text("abcdef/.", min_size=1, max_size=12), min_size=2, max_size=40), st.data())
def test_an_image_stays_on_its_side_whatever_images_come_and_go(names, data):
    before = images(names)
    kept = split(before)
    changed = data.draw(st.sets(st.sampled_from(sorted(names)))) | data.draw(
        st.sets(st.text("xyz", min_size=1, max_size=6), max_size=20)
    )
    after = images(changed or {"x"})
    held_before = names_of(before, sides(before, kept))
    held_after = names_of(after, sides(after, kept))
    for name in names & changed:
        assert (name in held_before) == (name in held_after)


@settings(max_examples=80, deadline=None)
@given(st.sets(st.integers(), min_size=2, max_size=60))
def test_neither_side_of_a_new_split_is_empty(numbers):
    train, validation = train_validation_split(images(map(str, numbers)))
    assert len(train) and len(validation) and len(train) + len(validation) == len(numbers)


def test_a_tenth_is_held_out_and_at_most_ten_thousand():
    dataset = images(f"{index}.png" for index in range(20_000))
    assert 0.09 < len(train_validation_split(dataset)[1]) / 20_000 < 0.11
    dataset = images(f"{index}.png" for index in range(200_000))
    assert 9_500 < len(train_validation_split(dataset)[1]) < 10_500


def test_the_numbers_of_names_are_fixed_for_good():
    numbers = numbers_of_names(images(["a.png", "b/c.jpg"]))
    assert numbers.tolist() == pytest.approx([0.4962016468, 0.0813007538])


def test_what_a_split_says_of_images_that_it_knows_and_does_not_know():
    dataset = images(f"{index}.png" for index in range(50))
    kept = split(dataset)
    assert is_held_out(dataset, kept) is True
    assert is_held_out(images([f"{index}.png" for index in range(60)]), kept) is True
    moved = images([f"{index}.png" for index in range(50)], root="elsewhere")
    assert is_held_out(moved, kept) is True  # known by their names
    same_names = ImageFiles("custom", 8, 3, "others", [(f"{i}.png", 2, 1) for i in range(50)])
    assert is_held_out(same_names, kept) is None  # numbered alike, but of other sizes
    fewer = images([f"{index}.png" for index in range(5, 50)] + ["renamed.png"])
    assert is_held_out(fewer, kept) is None  # what is gone may be there under another name
    nested = images([f"photos/{index}.png" for index in range(50)], root="above")
    assert is_held_out(nested, kept) is None  # the same images under other names
    assert is_held_out(dataset, None) is None
    renamed = images([f"img_{index}.png" for index in range(50)])
    assert is_held_out(renamed, kept) is None
    assert is_held_out(dataset, {**kept, "seen_before": True}) is None
    assert is_held_out(dataset, apply_split(dataset, {"by": None})[2]) is False


def test_a_split_by_order_holds_only_for_as_many_images():
    dataset = images(f"{index}.png" for index in range(50))
    kept = apply_split(dataset, {"by": "order"})[2]
    assert is_held_out(dataset, kept) is True
    assert is_held_out(images([f"{index}.png" for index in range(51)]), kept) is None


def test_a_split_is_told_in_words():
    dataset = images(f"{index}.png" for index in range(50))
    kept = split(dataset)
    root = dataset.root_name
    assert describe(kept) == (
        f"trained on {kept['trained_on']} images of {root}, {kept['held_out']} held out by their "
        f"name"
    )
    assert describe(apply_split(dataset, {"by": None})[2]) == f"trained on 50 images of {root}"
    assert describe(None) == "which images it was trained on is not recorded"


def test_images_that_are_all_held_out_by_a_kept_split_are_an_error():
    dataset = images(f"{index}.png" for index in range(50))
    held = names_of(dataset, sides(dataset, split(dataset)))
    with pytest.raises(UserError, match="all of the .* images of custom are held out by the rule"):
        apply_split(images(held), split(dataset))
    others = [name for name in (f"{index}.png" for index in range(50)) if name not in held]
    with pytest.raises(UserError, match="none of the .* images of custom are held out"):
        apply_split(images(others), split(dataset))
