"""Methods that reduce patches before the first block: pre-merge, dedup and adaptive-patch."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import laconic
from families import BEFORE, FAMILIES, fill, images, make
from laconic.methods.dedup import equal_patches
from laconic.methods.ops import levels_of, merge_below, merge_cheapest, merge_neighbours, needed_depth, spread_costs
from test_laws import run

GRIDS = [(6, 6), (5, 7), (1, 9), (3, 3), (16, 16)]
CONSTANT = sorted(BEFORE - {"dedup"})


def size_of(family):
    return FAMILIES[family][1]["img_size"] // 6


def repeated(family, batch=3):
    """Images of 36 patches, of which the first has 3 of its own, the others 10 and 36."""
    side, x = size_of(family), images(family, batch)
    cells = x.unfold(2, side, side).unfold(3, side, side).flatten(2, 3).clone()  # [B, 3, 36, side, side]
    for image, unique in enumerate((3, 10, 36)[:batch]):
        cells[image] = cells[image][:, torch.arange(36) % unique]
    return cells.view(batch, 3, 6, 6, side, side).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


# ------------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("how", ["neighbours", "quadtree"])
def test_any_count_is_reached_exactly(grid, how):
    patches = grid[0] * grid[1]
    features = torch.randn(2, patches, 8, generator=torch.Generator().manual_seed(0))
    for count in {1, 2, 3, patches // 4, patches // 2, patches - 2, patches - 1, patches}:
        if how == "neighbours":
            group = merge_neighbours(features, grid, count)
        else:
            levels = levels_of(grid, needed_depth(grid, count, 2), features)
            group, _ = merge_cheapest(spread_costs(features, levels), levels, patches, count)
        for row in group.tolist():
            assert len(set(row)) == count
            assert all(row[first] == first and row.index(first) == first for first in row)  # named by their first patch


@pytest.mark.parametrize("grid", GRIDS)
def test_cells_of_a_quadtree_are_squares_and_the_most_uniform_ones(grid):
    patches = grid[0] * grid[1]
    features = torch.randn(1, patches, 4, generator=torch.Generator().manual_seed(0))
    row, column = torch.arange(patches) // grid[1], torch.arange(patches) % grid[1]
    flat = (row < 4) & (column < 4)
    features[:, flat] = 1.0
    levels = levels_of(grid, 2, features)
    group, scale = merge_below(spread_costs(features, levels), levels, patches, 1e-6)
    if grid == (16, 16):
        assert (group[0][flat] == 0).all()
        assert (scale[0][flat] == 2).all()
        assert torch.equal(group[0][~flat], torch.arange(patches)[~flat])
    for first in group.unique().tolist():
        members = group[0] == first
        level = int(scale[0][first])
        expected = (row >> level == row[first] >> level) & (column >> level == column[first] >> level)
        assert torch.equal(members, expected)


def test_neighbours_merge_and_others_do_not():
    """Two equal halves of a grid with different values inside each: no token crosses the border."""
    features = torch.eye(2).repeat_interleave(18, 0)[None] + 0.01 * torch.randn(1, 36, 2)
    group = merge_neighbours(features, (6, 6), 4)[0]
    assert set(group[:18].tolist()).isdisjoint(group[18:].tolist())
    for first in group.unique().tolist():  # every token is one connected piece
        cells = (group == first).view(1, 1, 6, 6).float()
        seen = torch.zeros_like(cells).flatten().index_fill(0, torch.tensor(first), 1.0).view_as(cells)
        cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
        for _ in range(36):
            seen = (F.conv2d(seen, cross, padding=1) > 0).float() * cells
        assert torch.equal(seen, cells)


def test_equal_patches_are_found_by_their_pixels():
    pixels = torch.randn(2, 50, 12)
    pixels[0, 7], pixels[0, 30], pixels[1, 49] = pixels[0, 3], pixels[0, 3], pixels[1, 0]
    pixels[0, 11, 5], pixels[0, 12] = 0.0, pixels[0, 11]
    pixels[0, 12, 5] = -0.0
    group = equal_patches(pixels, 0.0)
    expected = torch.arange(50).expand(2, -1).clone()
    expected[0, 7] = expected[0, 30] = 3
    expected[0, 12], expected[1, 49] = 11, 0
    assert torch.equal(group, expected)
    pixels[0, 20] = pixels[0, 2].add(1e-6)
    assert equal_patches(pixels, 0.0)[0, 20] == 20
    grid = pixels.div(0.1).round().mul(0.1)
    grid[0, 20] = grid[0, 2] + 0.02
    assert equal_patches(grid, 0.1)[0, 20] == 2
    grid[0, 21] = grid[0, 2] + 0.11
    assert equal_patches(grid, 0.1)[0, 21] == 21


# ------------------------------------------------------------------------------------------------ dedup
@pytest.mark.parametrize("family", list(FAMILIES))
def test_dedup_counts_and_provenance(family):
    model, x = laconic.reduce_(make(family), "dedup"), repeated(family)
    run(model, x)
    stage = laconic.provenance(model).final
    where = stage.where.gather(1, torch.zeros_like(stage.where))  # the token of the first patch
    assert [len(set(row.tolist())) for row in stage.where] == [3, 10, 36]
    assert stage.size.sum(1).tolist() == [36.0] * 3
    assert (where == stage.where[:, :1]).all()
    for image, unique in enumerate((3, 10, 36)):
        assert torch.equal(stage.where[image], stage.where[image][torch.arange(36) % unique])
        kept = stage.kept[image][stage.size[image] > 0]
        assert sorted(kept.tolist()) == list(range(unique))  # in the place of the first


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_image_without_equal_patches_is_answered_bit_for_bit(family):
    model, x = make(family), images(family)
    expected = run(model, x)
    laconic.reduce_(model, "dedup")
    assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize("family", ["plain", "gap", "siglip", "dinov3", "naflex", "beit", "parallel"])
@pytest.mark.parametrize("drop", ["none", "most-frequent"])
def test_every_execution_and_single_images_give_the_same(family, drop):
    x, outputs = repeated(family), []
    for execution in ("packed", "padded", "masked"):
        model = laconic.reduce_(make(family), "dedup", execution=execution, drop=drop)
        outputs += [run(model, x), torch.cat([run(model, one[None]) for one in x])]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dedup", "ats"])
def test_a_bucket_rounds_the_length_up(method):
    """Images with 3, 10 and 36 different patches of 36: the length is a multiple of the bucket, at most all patches."""
    x = repeated("plain")
    exact = laconic.reduce_(make("plain"), method)
    model = laconic.reduce_(make("plain"), method, execution="padded", bucket=8)
    for images_ in (x[:1], x[:2], x):
        torch.testing.assert_close(run(model, images_), run(exact, images_), rtol=1e-4, atol=1e-4)
        if method == "dedup":
            assert laconic.provenance(model).final.size.shape[1] == {1: 8, 2: 16, 3: 36}[len(images_)]
        else:
            assert laconic.provenance(model).final.size.shape[1] % 8 in (0, 4)


@pytest.mark.unchecked
def test_parts_of_blocks_are_compiled_once_for_each_bucket():
    counter = CompileCounter()
    model = laconic.reduce_(make("plain"), "dedup", execution="padded", bucket=16)
    x = repeated("plain")
    expected = [run(model, x[:1]), run(model, x[1:2]), run(model, x)]
    torch._dynamo.reset()
    model.blocks[0].mlp.compile(backend=counter, dynamic=False)
    for images_, answer in zip((x[:1], x[1:2], x[:1], x[1:2]), (*expected[:2], *expected[:2]), strict=True):
        torch.testing.assert_close(run(model, images_), answer, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1  # 3 and 10 patches are both 16 tokens


@pytest.mark.parametrize("options", [{"bucket": 0, "execution": "padded"}, {"bucket": 8}])
def test_a_bucket_that_does_nothing_is_refused(options):
    with pytest.raises(ValueError, match="bucket"):
        laconic.reduce_(make("plain"), "dedup", **options)


def test_without_positions_dedup_is_exact():
    """Equal patches differ in their positions only: without positions they are equal in every block, and the answer is the base's."""
    for family in ("plain", "gap"):
        model, x = make(family), repeated(family)
        with torch.no_grad():
            model.pos_embed.zero_()
        expected = run(model, x)
        laconic.reduce_(model, "dedup")
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
        assert laconic.provenance(model).final.size.shape[1] == 36
        run(model, x[:1])
        assert laconic.provenance(model).final.size.shape[1] == 3


def test_the_background_is_dropped():
    x = repeated("plain")
    x[0, :, :32] = 0.25  # two rows of six patches
    model = laconic.reduce_(make("plain"), "dedup", drop="most-frequent")
    run(model, x[:1])
    stage = laconic.provenance(model).final
    assert (stage.where[0, :12] == -1).all()
    assert (stage.where[0, 12:] >= 0).all()
    run(model, torch.zeros_like(x))  # nothing but background: it stays
    assert laconic.provenance(model).final.size.tolist() == [[36.0]] * 3


def test_mean_position_is_the_mean_of_the_tokens():
    model, x, seen = laconic.reduce_(make("plain"), "dedup", position="mean"), repeated("plain"), []

    def around(own, tokens, *given):
        seen.extend((tokens, own(tokens, *given)))
        return seen[-1]

    model.laconic.around = around
    run(model, x[:1])
    before, after = seen
    means = torch.stack([before.patches[0][torch.arange(36) % 3 == unique].mean(0) for unique in range(3)])
    torch.testing.assert_close(after.patches[0, :3], means, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.x[0, 0], before.x[0, 0])


# ------------------------------------------------------------------------------------------------ adaptive-patch
@pytest.mark.parametrize("family", ["plain", "dinov2-reg", "naflex"])
def test_a_cell_is_embedded_as_its_resized_pixels(family):
    """The tokens of cells are what the model makes of the picture at half its size, with averaged positions."""
    model, x = make(family), images(family)
    half = F.avg_pool2d(x, 2)
    if family == "naflex":
        weight, bias = model.embeds.proj.weight, model.embeds.proj.bias
        side = size_of(family)
        cells = half.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
        expected = F.linear(cells, weight, bias)
    else:
        expected = model.patch_embed.proj(half).flatten(2).transpose(1, 2)
    laconic.reduce_(model, "adaptive-patch", schedule={"at": [0], "keep_counts": [9]}, levels=1)
    seen = []
    layer = model.embeds.proj if family == "naflex" else model.patch_embed.proj
    layer.register_forward_hook(lambda module, args, out: seen.append(out.clone()))  # positions are added in place
    run(model, x)
    found = seen[0] if family == "naflex" else seen[0].flatten(2).transpose(1, 2)
    corner = [2 * row * 6 + 2 * column for row in range(3) for column in range(3)]
    torch.testing.assert_close(found[:, corner], expected, rtol=1e-4, atol=1e-4)
    stage = laconic.provenance(model).final
    assert stage.size.tolist() == [[4.0] * 9] * 3


@pytest.mark.parametrize("detail", ["entropy", "similarity"])
def test_a_threshold_merges_flat_regions_only(detail):
    x = images("plain")
    x[0, :, :64, :64] = 0.3  # four by four patches
    x[1, :, :32, :32] = 0.3
    model = laconic.reduce_(make("plain"), "adaptive-patch", threshold=1e-4, detail=detail)
    assert model.laconic.config.info.count == "variable"
    run(model, x)
    stage = laconic.provenance(model).final
    assert (stage.size > 0).sum(1).tolist() == [21, 33, 36]
    singles = torch.cat([run(model, one[None]) for one in x])
    torch.testing.assert_close(run(model, x), singles, rtol=1e-4, atol=1e-4)
    none = make("plain")
    expected = run(none, x[2:])
    torch.testing.assert_close(run(model, x[2:]), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="not both"):
        laconic.reduce_(make("plain"), "adaptive-patch", threshold=1.0, keep=0.5)


def test_the_projection_starts_at_zero_and_learns():
    x, outputs = images("plain"), []
    for projection in (False, True):
        model = laconic.reduce_(make("plain"), "adaptive-patch", keep=0.4, projection=projection)
        outputs.append(run(model, x))
    assert torch.equal(*outputs)
    model.train()
    model(x).square().mean().backward()
    assert model.laconic.reducers["0"].projection.weight.grad.abs().sum() > 0
    fill(model.laconic)
    assert not torch.allclose(run(model.eval(), x), outputs[0])


# ------------------------------------------------------------------------------------------------ all of them
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", CONSTANT)
def test_every_family(method, family):
    x, base = images(family), make(family)
    expected = run(base, x)
    model = laconic.reduce_(make(family), method, keep=1.0)
    assert torch.equal(run(model, x), expected)
    laconic.restore_(model)
    laconic.reduce_(model, method, keep=0.6)
    out = run(model, x)
    stage = laconic.provenance(model).final
    assert stage.size.shape[1] == 22
    assert torch.equal(stage.size.sum(1), torch.full((3,), 36.0))
    assert torch.equal(stage.where.gather(1, stage.kept), torch.arange(22).expand(3, -1))
    torch.testing.assert_close(torch.cat([run(model, one[None]) for one in x]), out, rtol=1e-4, atol=1e-4)
    assert not model.laconic.entry(1).per_token
    laconic.restore_(model)
    assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize("method", sorted(BEFORE))
def test_nothing_of_a_batch_stays_on_the_model(method):
    """Two threads run one model on different images, and a forward runs inside another."""
    model = laconic.reduce_(make("plain"), method, **({} if method == "dedup" else {"keep": 0.5}))
    x, y = repeated("plain"), repeated("plain").flip(0)
    expected = {id(x): run(model, x), id(y): run(model, y)}
    wrong = []

    def work(batch):
        for _ in range(5):
            if not torch.equal(run(model, batch), expected[id(batch)]):
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (x, y)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    inner, once = [], [True]

    def nested(module, args, out):
        if once.pop() if once else False:
            inner.append(run(model, y))

    model.patch_embed.proj.register_forward_hook(nested)
    assert torch.equal(run(model, x), expected[id(x)])
    torch.testing.assert_close(inner[0], expected[id(y)], rtol=1e-5, atol=1e-5)  # inside another forward all rows are computed
    assert torch.equal(run(copy.deepcopy(model), x), expected[id(x)])


@pytest.mark.parametrize("method", sorted(BEFORE))
def test_what_cannot_be_reduced_before_the_first_block_is_refused(method):
    given = {} if method == "dedup" else {"keep": 0.5}
    with pytest.raises(ValueError, match="block 0 only"):
        laconic.reduce_(make("plain"), method, at=[1], **given)
    overlapping = make("plain")
    overlapping.patch_embed.proj.stride = (8, 8)
    overlapping.patch_embed.proj.padding = (4, 4)
    with pytest.raises((LookupError, ValueError), match="without overlap|tokens|does not"):
        laconic.reduce_(overlapping, method, **given)
    model = laconic.reduce_(make("plain"), method, **given)
    with pytest.raises(RuntimeError, match="patch embedding did not run"):
        model.blocks[0](torch.randn(2, 37, 48))


@pytest.mark.parametrize("first", ["pre-merge", "adaptive-patch"])
@pytest.mark.parametrize("family", ["plain", "siglip", "dinov3"])
def test_chained_with_a_method_further_in(first, family):
    chain = laconic.Chain((first, {"keep": 0.5}), ("tome", {"r": 3}))
    model, x = laconic.reduce_(make(family), chain), images(family)
    out = run(model, x)
    assert model.laconic.counts() == (15, 12, 9, 6)
    assert laconic.provenance(model).final.size.sum(1).tolist() == [36.0] * 3
    torch.testing.assert_close(torch.cat([run(model, one[None]) for one in x]), out, rtol=1e-4, atol=1e-4)
    expected = run(make(family), x)
    none = laconic.reduce_(make(family), laconic.Chain((first, {"keep": 1.0}), ("tome", {"keep": 1.0})))
    assert torch.equal(run(none, x), expected)


def test_features_are_restored_to_every_patch():
    x = repeated("plain")
    model = laconic.reduce_(make("plain"), "dedup", restore=True)
    with torch.no_grad():
        features = model.forward_features(x)
    assert features.shape[1] == 37
    for image, unique in enumerate((3, 10, 36)):
        assert torch.equal(features[image, 1:], features[image, 1:][torch.arange(36) % unique])
