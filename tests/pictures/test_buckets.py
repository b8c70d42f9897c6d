"""Buckets: the laws of their sizes."""

from math import log

from hypothesis import given, settings
from hypothesis import strategies as some

from lora_studio.pictures import buckets
from lora_studio.pictures.buckets import bucket
from tests.pictures import task

fast = settings(max_examples=200, deadline=None, derandomize=True)
edges = some.integers(8, 12000)
resolutions = some.integers(4, 256).map(lambda number: 8 * number)
steps = some.sampled_from([8, 16, 32, 64, 128])


@fast
@given(edges, edges, resolutions, steps)
def test_edges_are_multiples_of_the_step_and_the_area_is_the_largest_within_the_square(width, height, resolution, step):
    wide, high = bucket(width, height, task(resolution=resolution, bucket_step=step))
    assert wide % step == 0 and high % step == 0
    if step > resolution:
        assert (wide, high) == (step, step)
    else:
        assert wide * high <= resolution**2
        square = wide == high == resolution // step * step
        assert (
            square
            or (max(wide, high) + step) * min(wide, high) > resolution**2
            or max(wide, high) * (min(wide, high) + step) > resolution**2
        )


@fast
@given(edges, edges, resolutions, steps)
def test_no_bucket_has_a_shape_nearer_to_the_pictures(width, height, resolution, step):
    chosen = bucket(width, height, task(resolution=resolution, bucket_step=step))
    every = {size for found in buckets._landscapes(resolution, step) for size in (found, found[::-1])}

    def distance(size):
        return abs(log(size[0] / size[1]) - log(width / height))

    assert chosen in every
    assert distance(chosen) <= min(map(distance, every)) + 1e-9


@fast
@given(edges, edges, resolutions, steps)
def test_a_turned_picture_has_the_turned_bucket(width, height, resolution, step):
    settings = task(resolution=resolution, bucket_step=step)
    assert bucket(height, width, settings) == bucket(width, height, settings)[::-1]


@fast
@given(edges, edges, resolutions, steps)
def test_no_bucket_is_narrower_than_one_to_four(width, height, resolution, step):
    wide, high = bucket(width, height, task(resolution=resolution, bucket_step=step))
    assert max(wide, high) <= 4 * min(wide, high)


@fast
@given(some.integers(1, 500), resolutions)
def test_a_square_is_trained_as_the_square_where_the_step_allows(edge, resolution):
    assert bucket(edge, edge, task(resolution=resolution, bucket_step=8)) == (resolution, resolution)


@fast
@given(edges, edges, resolutions)
def test_without_buckets_everything_is_the_square(width, height, resolution):
    settings = task(resolution=resolution, buckets=False).model_copy(update={"bucket_step": 64})
    assert bucket(width, height, settings) == (resolution, resolution)


def test_the_usual_buckets_of_512_are_the_fields():
    settings = task(resolution=512, bucket_step=64)
    assert [bucket(w, h, settings) for w, h in [(3, 2), (2, 3), (4, 3), (16, 9), (4, 1), (9, 1)]] == [
        (640, 384), (384, 640), (576, 448), (640, 384), (1024, 256), (1024, 256),
    ]  # fmt: skip


def test_no_picture_is_enlarged_for_a_further_resolution_in_either_direction():
    given_task = task(resolution=64, bucket_step=8, more_resolutions=[128, 256])
    for width, height, wanted in (
        (256, 256, [64, 128, 256]), (256, 255, [64, 128]), (800, 100, [64, 128]), (100, 800, [64, 128]), (128, 128, [64, 128]), (8, 8, [64]),
    ):  # fmt: skip
        assert buckets.edges(width, height, given_task) == wanted, (width, height)
        for edge in wanted[1:]:
            wide, high = buckets.bucket(width, height, given_task, edge=edge)
            assert wide <= width and high <= height and wide * high <= edge * edge
