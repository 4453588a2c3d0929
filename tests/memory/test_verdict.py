"""Whether it fits, on invented blocks whose sums can be done in the head."""

import pytest

from qcli.memory.placing.hardware import Gpu
from qcli.memory.placing.split import Block, device_map_auto
from qcli.memory.placing.verdict import FITS, NO, TIGHT, Needs, count_that_fits, fits, offload, place


def gpus(*sizes: int) -> list[Gpu]:
    return [Gpu(f"{size}", size, "") for size in sizes]


def needs(layers: int = 8, weights: int = 10, state: int = 2, activations: int = 5, overhead=(1, 3, 6)) -> Needs:
    stack = [Block(f"layer {i}", weights, weights, state) for i in range(layers)]
    return Needs([Block("embedding", 7, 7), *stack, Block("head", 7, 7)], activations, overhead)


def placed(*sizes: int):
    """The placement of `needs()`, device_map="auto" first."""
    return place(needs(), gpus(*sizes), device_map_auto(needs().blocks, sizes, quantized=False))


def test_the_sums():
    asked = needs()
    assert (asked.weights, asked.state) == (94, 16)
    assert (asked.least, asked.likely, asked.most) == (116, 118, 121)


@pytest.mark.parametrize("size, verdict, left", [(121, FITS, 0), (130, FITS, 9), (120, TIGHT, -1), (116, TIGHT, -5), (115, NO, -6)])
def test_one_gpu(size, verdict, left):
    placement = placed(size)
    assert (placement.verdict, placement.left, placement.automatic) == (verdict, left, True)
    assert fits(needs(), gpus(size)) == (verdict == FITS)


def test_every_gpu_pays_for_activations_and_overhead():
    # 110 of weights and state in blocks of 12, 7 and 7: 55 and 55 at best, and 5 + 6 beside them
    assert fits(needs(), gpus(66, 66))
    assert not fits(needs(), gpus(65, 66))
    placement = placed(66, 66)
    assert placement.verdict == FITS and placement.left == 0
    assert [(load.weights, load.state) for load in placement.loads] == [(47, 8), (47, 8)]
    assert placed(61, 61).verdict == TIGHT
    short = placed(60, 60)
    assert short.verdict == NO and short.left == -12 - 7  # 49 take 7 + 3 x 12 and 4 x 12: a layer and the head are over
    assert place(needs(layers=1), gpus(10, 10), None).left == -26 - 1 - 1  # not even 5 + 6 beside the blocks fit


def test_the_split_of_device_map_auto_is_taken_where_it_fits():
    placement = placed(100, 100)
    assert placement.verdict == FITS and placement.automatic
    # a share of 94 / 2 and a buffer of 1.25 x 10, less the 10 that GPU 0 keeps free: 49 hold the embedding and four layers
    assert placement.loads[0].holds == "embedding, layers 0-3"


def test_another_split_is_taken_where_that_does_not_fit():
    # device_map="auto" puts three layers on GPU 0, whose state has no room there: 7 + 3 x 12 > 50 - 11
    placement = placed(50, 100)
    assert placement.verdict == FITS and not placement.automatic
    assert [load.holds for load in placement.loads] == ["embedding, layers 0-1", "layers 2-7, head"]


def test_without_a_split_that_comes_of_itself_it_is_as_even_as_it_can_be():
    placement = place(needs(), gpus(100, 100), None)
    assert [load.holds for load in placement.loads] == ["embedding, layers 0-3", "layers 4-7, head"]
    assert placement.verdict == FITS and not placement.automatic


def test_a_gpu_that_is_not_needed_lacks_nothing():
    placement = placed(200, 3)
    assert (placement.verdict, placement.left) == (FITS, 3)
    idle = placement.loads[1]
    assert (idle.holds, idle.activations, idle.overhead, idle.left) == ("nothing", 0, (0, 0, 0), 3)


def test_how_many_gpus():
    assert count_that_fits(lambda given: needs(), gpus(121)[0]) == 1
    assert count_that_fits(lambda given: needs(), gpus(120)[0]) == 2
    assert count_that_fits(lambda given: needs(), gpus(23)[0]) == 10  # a block of 12 on each, 11 beside it
    assert count_that_fits(lambda given: needs(), gpus(22)[0]) is None


def test_what_goes_to_the_cpu_leaves_its_state_on_the_gpu():
    # 80 - 5 - 6 - 10 kept for the layer that runs = 59: the embedding, n layers of 12 and the 8 - n others' 2 each
    assert offload(needs(), gpus(80)) == 5 * 10 + 7
    assert offload(needs(state=0), gpus(80)) == 3 * 10 + 7
    assert offload(needs(), gpus(30)) is None
    assert offload(needs(state=100), gpus(200)) is None
