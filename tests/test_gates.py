"""What makes a reduction quick, without a clock: which operations a reduced forward runs, and which it never does."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import laconic
from families import FAMILIES, METHODS, VARIABLE, at, images, make, options, reduced, serves

CONSTANT = [m for m in METHODS if m not in VARIABLE]
BY_TOKENS = [m for m in CONSTANT if not laconic.methods()[m].full_attention]
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Record(TorchDispatchMode):
    """Every operation by name, with the shapes of what goes in and comes out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket._qualified_op_name.partition("::")[2], args, out))
        return out


def recorded(model, x):
    with Record() as record, torch.no_grad():
        model(x)
    return record.calls


def reduced_calls(method, family="plain", **changes):
    # 144 patches of a single head's width: no feature dimension is as long as the sequence
    model = laconic.reduce_(
        make(family, img_size=192, **changes), method, keep=0.6, at=at(method, (1, 2)), **options(method, family)
    )
    return recorded(model, torch.randn(2, 3, 192, 192))


def tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for t in out if isinstance(t, torch.Tensor)] if isinstance(out, (list, tuple)) else []


@pytest.mark.parametrize("method", CONSTANT)
def test_the_host_never_waits_for_the_device(method):
    assert {name for name, _, _ in reduced_calls(method)} & set(SYNCS) == set()


@pytest.mark.parametrize("method", BY_TOKENS)
def test_no_matrix_of_attention(method):
    """The attention of all tokens to all is inside the fused call and nowhere else: nothing per head is N x N."""
    for name, _, out in reduced_calls(method):
        if not name.startswith(tuple(f"_{a}" for a in ATTENTION)) and not name.startswith(ATTENTION):
            for t in tensors(out):
                square = t.dim() == 4 and min(t.shape[-2:]) >= 86 and t.shape[-1] != 16 and t.shape[1] == 3
                assert not square or t.shape[-1] in (192, 96), (name, t.shape)  # those are images, also at half their size


# tokens that are scored by one row of attention, and matched at most to those that stay
ROWS = ("topk", "evit", "etps", "random", "dynamicvit", "dtps", "patch-slimming", "heuristic", "avg-pool")


@pytest.mark.parametrize("method", ROWS)
def test_nothing_is_as_large_as_all_pairs_of_tokens(method):
    for name, _, out in reduced_calls(method):
        if not any(a in name for a in ATTENTION):
            for t in tensors(out):
                pairs = t.dim() >= 2 and t.shape[-1] >= 144 and t.shape[-2] >= 144
                assert not (pairs and t.shape[-1] not in (192, 48 * 3)), (name, t.shape)


@pytest.mark.parametrize("method", CONSTANT)
def test_rows_are_gathered_flat(method):
    """A gather by an index that was expanded over the channels is many times slower than one of rows."""
    for name, args, _ in reduced_calls(method):
        if name in ("gather", "take_along_dim"):
            index = args[2]
            assert not (index.dim() == 3 and index.shape[-1] > 1 and index.stride(-1) == 0), (name, index.shape)


# those that look ahead run the first half of a block twice
@pytest.mark.parametrize("method", [m for m in CONSTANT if laconic.methods()[m].phase != "ahead"])
def test_fused_attention_is_called_as_often_as_ever(method):
    def fused(calls):
        return sum("scaled_dot_product" in name for name, _, _ in calls)

    assert fused(reduced_calls(method)) == 4
    assert fused(recorded(make("plain"), images("plain"))) == 4


@pytest.mark.parametrize("family", [f for f in FAMILIES if serves("etps", f)])
def test_a_second_call_runs_the_same_operations(family):
    model = reduced("etps", family)
    first, second = ([name for name, _, _ in recorded(model, images(family))] for _ in range(2))
    assert first == second


# operations that a reduction adds to a forward, at one site: a bound a little above today's count, so that growth is seen
ADDED = {"topk": 24, "evit": 34, "etps": 58, "bat": 62, "tome": 52}


@pytest.mark.parametrize("method", ADDED)
def test_few_operations_are_added(method):
    def run(model):
        return [name for name, _, _ in recorded(model, images("plain")) if name not in VIEWS]

    plain = len(run(make("plain")))
    site = len(run(laconic.reduce_(make("plain"), method, keep=0.6, at=[1], compute="all"))) - plain
    assert 0 < site <= ADDED[method]


VIEWS = (
    "view",
    "_unsafe_view",
    "expand",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "slice",
    "select",
    "t",
    "detach",
    "alias",
    "unbind",
)


def calls_of_python(model, x):
    """Python functions entered in one forward."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    with torch.no_grad():
        model(x)
        sys.setprofile(note)
        try:
            model(x)
        finally:
            sys.setprofile(None)
    return count


# at a batch of one these are what a reduction costs beside its operations: bounds a little above today's count
CALLS = {"topk": 320, "evit": 300, "etps": 345, "bat": 390, "tome": 430}


@pytest.mark.unchecked
@pytest.mark.parametrize("method", CALLS)
def test_few_calls_are_added(method):
    """Over 12 blocks, reduced at three of them."""
    x, plain = images("plain", 1), make("plain", depth=12)
    reduced = laconic.reduce_(make("plain", depth=12), method, keep=0.7)
    added = calls_of_python(reduced, x) - calls_of_python(plain, x)
    assert 0 < added <= CALLS[method]
