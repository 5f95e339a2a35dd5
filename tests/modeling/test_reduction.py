"""What must hold for every grouping in the table; a new one gets all of it from its row. Then the interface itself."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusModel, AiluRusSegformerModel, apply_ailurus
from ailurus_hf.budget import with_budget
from ailurus_hf.modeling.reduction import (
    GROUPINGS,
    Grouping,
    Reduction,
    ReductionContext,
    features,
    reduce,
    reduce_sequence,
    reduce_to_groups,
    register_grouping,
    registered,
)
from ailurus_hf.modeling.settings import AdaptiveResolutionSettings
from ailurus_hf.modeling.token_groups import group_tokens, unfold_tokens
from tests.factories import random_images, tiny_config, tiny_model, tiny_segformer, tiny_segformer_config

GRID = (6, 8)
GRIDS = [GRID, (7, 13), (1, 5), (3, 4, 5)]


def tokens_on(grid, batch_size=2, hidden_size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, math.prod(grid), hidden_size, generator=generator)


def reduced(tokens, grid, num_groups, grouping, unfold="residual"):
    return reduce(tokens, grid, num_groups, AdaptiveResolutionSettings(grouping=grouping, unfold=unfold))


@pytest.fixture(params=list(GROUPINGS))
def grouping(request):
    return request.param


# -------------------------------------------------------------------------------------------------- every grouping


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_group_has_its_members_and_its_representative(grouping, grid):
    num_tokens = math.prod(grid)
    for num_groups in sorted({1, 2, num_tokens // 3, num_tokens - 1} - {0}):
        groups = reduced(tokens_on(grid), grid, num_groups, grouping).groups
        assert groups.sizes.shape == (2, num_groups)
        assert groups.sizes.min() >= 1
        assert groups.sizes.sum(1).tolist() == [num_tokens] * 2
        assert torch.equal(groups.assignment.gather(1, groups.representatives), torch.arange(num_groups).expand(2, -1))


@given(height=st.integers(1, 9), width=st.integers(1, 9), share=st.floats(0.05, 1), seed=st.integers(0, 5))
def test_tokens_come_back(height, width, share, seed):
    for name in GROUPINGS:
        tokens, num_groups = tokens_on((height, width), seed=seed), max(int(share * height * width), 1)
        for unfold in ("copy", "residual"):
            reduction = reduced(tokens, (height, width), num_groups, name, unfold)
            if num_groups == height * width:
                assert reduction is None
                continue
            assert reduction.tokens.shape == (2, num_groups, 8)
            back = reduction.restore(reduction.tokens)
            expected = tokens if unfold == "residual" else reduction.spread(reduction.merge(tokens))
            torch.testing.assert_close(back, expected, rtol=0, atol=1e-5)


def test_images_do_not_see_each_other(grouping):
    tokens = tokens_on((7, 13), batch_size=3)
    together = reduced(tokens, (7, 13), 30, grouping)
    for index in range(3):
        alone = reduced(tokens[index : index + 1], (7, 13), 30, grouping)
        assert torch.equal(alone.groups.assignment[0], together.groups.assignment[index])
        assert torch.equal(alone.tokens[0], together.tokens[index])


def test_what_a_user_does_to_the_groups_changes_no_later_ones(grouping):
    groups = reduced(tokens_on(GRID, 1), GRID, 12, grouping).groups
    expected = [part.clone() for part in groups]
    for part in groups:
        part.fill_(7)
    assert all(map(torch.equal, reduced(tokens_on(GRID, 1), GRID, 12, grouping).groups, expected))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf], ids=str)
def test_constant_and_broken_tokens_get_valid_groups(grouping, value):
    tokens = torch.full((1, 48, 8), value)
    first, second = (reduced(tokens, (6, 8), 12, grouping).groups for _ in range(2))
    assert first.sizes.min() >= 1
    assert torch.equal(first.assignment, second.assignment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(grouping, dtype):
    reduction = reduced(tokens_on((6, 8)).to(dtype), (6, 8), 12, grouping)
    assert reduction.tokens.dtype == reduction.restore(reduction.tokens).dtype == dtype
    assert reduction.log_sizes.dtype == torch.float32


def test_models_take_it_and_keep_their_shapes(grouping):
    plain = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=1)
    output = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.25, grouping=grouping)(random_images())
    assert output.group_sizes.shape == (2, 9)
    assert output.logits.shape == plain(random_images()).logits.shape
    hierarchical = tiny_segformer(AiluRusSegformerModel, keep_ratio=0.25, grouping=grouping)(random_images(2, 64, 64))
    assert [sizes.shape[1] for sizes in hierarchical.group_sizes] == [256, 64, 4, 1]


def test_one_graph(grouping):
    model = tiny_model(AiluRusModel, keep_ratio=0.25, grouping=grouping, neighborhood_size=8)
    expected = model(random_images()).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(random_images()).last_hidden_state, expected)


def test_exports_with_a_dynamic_batch(grouping):
    model = tiny_model(AiluRusModel, keep_ratio=0.25, grouping=grouping, neighborhood_size=8)
    batch = torch.export.Dim("batch", min=2, max=16)
    exported = torch.export.export(model, (random_images(2),), dynamic_shapes=({0: batch},)).module()
    found = exported(random_images(3)).last_hidden_state
    torch.testing.assert_close(found, model(random_images(3)).last_hidden_state)


# --------------------------------------------------------------------------------------------------- regular grid


def test_a_quarter_of_the_grid_is_average_pooling():
    tokens = tokens_on((6, 8))
    pooled = nn.functional.avg_pool2d(tokens.transpose(1, 2).unflatten(2, (6, 8)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reduced(tokens, (6, 8), 12, "grid").tokens, pooled)


@given(sides=st.lists(st.integers(1, 7), min_size=2, max_size=3), share=st.floats(0, 1))
@example(sides=[2, 2, 1], share=1.0)  # boxes beside each other have one group, and two
def test_cells_of_the_grid_are_boxes_with_their_middle(sides, share):
    grid, num_tokens = tuple(sides), math.prod(sides)
    num_groups = min(max(int(share * num_tokens), 1), num_tokens - 1)
    if num_groups < 1:
        return
    groups = reduced(tokens_on(grid, batch_size=1), grid, num_groups, "grid").groups
    cells = groups.assignment[0].view(grid)
    for cell, representative in enumerate(groups.representatives[0]):
        places = (cells == cell).nonzero()
        low, high = places.amin(0), places.amax(0)
        assert math.prod((high - low + 1).tolist()) == len(places)
        middle = torch.stack(torch.unravel_index(representative, grid))
        assert torch.equal(middle, (low + high) // 2)


# ---------------------------------------------------------------------------------- what a method may be, and ask for


def soft(tokens, grid, num_groups, settings, context):
    """Every token is a share of every group: a method that is no hard grouping."""
    weights = (tokens @ tokens[:, :num_groups].transpose(1, 2)).softmax(-1)
    merged = weights.transpose(1, 2) @ tokens / weights.sum(1)[..., None]
    return Reduction(
        tokens=merged,
        log_sizes=weights.sum(1).float().log(),
        restore=lambda short: weights @ short,
        kept_positions=lambda: torch.arange(num_groups).expand(len(tokens), -1),
        merge=lambda grid_tokens: weights.transpose(1, 2) @ grid_tokens / weights.sum(1)[..., None],
        spread=lambda short: weights @ short,
    )


def prune(tokens, grid, num_groups, settings, context):
    """Only the first tokens go on; the others come back as they were."""
    return Reduction(
        tokens=tokens[:, :num_groups],
        log_sizes=torch.zeros(len(tokens), num_groups),
        restore=lambda short: torch.cat([short, tokens[:, num_groups:]], dim=1),
        kept_positions=lambda: torch.arange(num_groups).expand(len(tokens), -1),
    )


def halve(tokens, grid, num_groups, settings, context):
    """Half as many tokens at every place, pairs of neighbours in the sequence."""
    before, count = context.reduction, -(-tokens.shape[1] // 2)
    pairs = (torch.arange(tokens.shape[1]) // 2).expand(len(tokens), -1)
    here = reduce_to_groups(tokens, group_tokens(pairs, count))
    if before is None:
        return here
    sizes = torch.logsumexp(
        torch.nn.functional.pad(before.log_sizes, (0, 2 * count - tokens.shape[1]), value=-math.inf).unflatten(
            1, (-1, 2)
        ),
        dim=-1,
    )
    return Reduction(
        tokens=here.tokens,
        log_sizes=sizes,
        restore=lambda short: before.restore(here.restore(short)),
        kept_positions=lambda: before.kept_positions().gather(1, here.kept_positions()),
        merge=lambda grid_tokens: here.merge(before.merge(grid_tokens)),
        spread=lambda short: before.spread(here.spread(short)),
    )


@pytest.mark.parametrize("method", [soft, prune], ids=["soft", "prune"])
def test_a_method_may_make_the_reduction_itself(method):
    with registered("other", Grouping(reduce=method)):
        model = tiny_model(AiluRusModel, keep_ratio=0.25, grouping="other")
        output = model(random_images(), output_hidden_states=True)
        assert output.assignment is None
        assert {states.shape[1] for states in output.hidden_states} == {37}
        adapted = apply_ailurus(native_vit(), cluster_layer=1, keep_ratio=0.25, grouping="other")
        assert adapted(random_images()).last_hidden_state.shape[1] == 37
        if method is soft:
            tiny_segformer(AiluRusSegformerModel, grouping="other")(random_images(2, 64, 64))
        else:
            with pytest.raises(ValueError, match="has no merge and spread, which SegFormer's blocks need"):
                tiny_segformer(AiluRusSegformerModel, grouping="other")(random_images(2, 64, 64))


def test_a_method_may_merge_in_several_places():
    grouping = Grouping(reduce=halve, places=lambda settings, layers: layers[:2])
    lengths = []

    def note(layer, args):
        lengths.append(args[0].shape[1])

    with registered("halve", grouping):
        model = tiny_model(AiluRusModel, keep_ratio=0.25, grouping="halve", cluster_layer=1)
        for layer in model.layers:
            layer.register_forward_pre_hook(note)
        output = model(random_images(), output_hidden_states=True)
        assert lengths == [37, 19, 10, 10]
        assert {states.shape[1] for states in output.hidden_states} == {37}
        adapted = native_vit()
        apply_ailurus(adapted, cluster_layer=1, keep_ratio=0.25, grouping="halve")
        lengths.clear()
        for layer in adapted.layers:
            layer.register_forward_pre_hook(note)
        states = adapted(random_images(), output_hidden_states=True).hidden_states
        assert lengths == [37, 19, 10, 10]
        assert {state.shape[1] for state in states} == {37}
        stages = tiny_segformer(AiluRusSegformerModel, keep_ratio=0.25, grouping="halve", depths=(2, 3, 4, 3))(
            random_images(2, 64, 64)
        )
        assert stages.last_hidden_state.shape == (2, 64, 2, 2)


TWICE = [[1, 0.5], [3, 0.25]]


def test_what_is_merged_merges_again():
    lengths = []

    def note(layer, args):
        lengths.append(args[0].shape[1])

    model, images = tiny_model(AiluRusModel, places=TWICE), random_images()
    handles = [layer.register_forward_pre_hook(note) for layer in model.layers]
    output = model(images, output_hidden_states=True)
    assert lengths == [37, 19, 19, 10]
    assert {states.shape[1] for states in output.hidden_states} == {37}
    assert output.group_sizes.shape == (2, 9)
    assert torch.equal(output.group_sizes, torch.stack([row.bincount() for row in output.assignment]))
    for handle in handles:
        handle.remove()
    # Nothing further to merge at the second place, and what is given later.
    with with_budget(model, keep_ratio=0.5, cluster_layer=1):
        once = model(images).last_hidden_state
    with with_budget(model, places=[[1, 0.5], [3, 0.5]]):
        assert torch.equal(model(images).last_hidden_state, once)
    assert torch.equal(model(images, keep_ratio=0.5).last_hidden_state, once)
    assert torch.equal(model(images, num_clusters=18).last_hidden_state, once)
    with with_budget(model, places=TWICE), with_budget(model, keep_ratio=1):
        plain = model(images).last_hidden_state
    model.config.keep_ratio = 1.0
    assert torch.equal(model(images).last_hidden_state, plain)
    with with_budget(model, places=TWICE):  # given later than the ratio
        assert torch.equal(model(images).last_hidden_state, output.last_hidden_state)
    with with_budget(model, keep_ratio=1), with_budget(model, places=TWICE):
        assert torch.equal(model(images).last_hidden_state, output.last_hidden_state)


def test_merging_again_in_one_graph_and_exported():
    model, images = tiny_model(AiluRusModel, places=TWICE), random_images(3)
    expected = model(images).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).last_hidden_state, expected)
    batch = torch.export.Dim("batch", min=2, max=16)
    exported = torch.export.export(model, (random_images(2),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(images).last_hidden_state, expected)


def test_merging_again_image_by_image_and_backward():
    model, images = tiny_model(AiluRusModel, places=TWICE).double(), random_images(3).double()
    expected = model(images).last_hidden_state
    for index in range(3):
        torch.testing.assert_close(model(images[index, None]).last_hidden_state[0], expected[index])
    model.activation_checkpointing_enable()
    model.train()
    model(images).last_hidden_state.square().mean().backward()
    checkpointed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_disable()
    model(images).last_hidden_state.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(checkpointed[name], parameter.grad)
        assert parameter.grad.any()


def test_the_second_merge_is_that_of_the_grid_it_stands_for():
    tokens, settings = tokens_on(GRID), AdaptiveResolutionSettings(places=TWICE)
    first = reduce(tokens, GRID, 20, settings)
    later = first.tokens + torch.randn_like(first.tokens)
    second = reduce(later, GRID, 10, settings, ReductionContext(reduction=first))
    full = first.restore(later)
    for group in range(10):
        members = second.groups.assignment[0] == group
        torch.testing.assert_close(second.tokens[0, group], full[0, members].mean(0))
        inside = first.groups.assignment[0][members].unique()
        assert torch.isin(first.groups.assignment[0], inside).equal(members)  # whole groups
    torch.testing.assert_close(second.restore(second.tokens), full)
    torch.testing.assert_close(second.log_sizes.exp().sum(1), torch.full((2,), float(math.prod(GRID))))


def test_adapted_models_merge_again():
    native = native_vit()
    own = tiny_model(AiluRusModel, places=TWICE, use_cls_token=True)
    lengths = []
    apply_ailurus(native, places=TWICE)
    for layer in native.layers:
        layer.register_forward_pre_hook(lambda layer, args: lengths.append(args[0].shape[1]))
    states = native(random_images(), output_hidden_states=True).hidden_states
    assert lengths == [37, 19, 19, 10]
    assert {state.shape for state in states} == {own(random_images()).last_hidden_state.shape}
    apply_ailurus(native, keep_ratio=0.5)
    assert native.config.ailurus["places"] is None


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[3, 0.5], [1, 0.25]], "each above the one before"),
        ([[1, 0.25], [3, 0.5]], "shares that fall"),
        ([[1, 0.5, 3]], "pairs"),
        ([], "pairs"),
        ([1, 0.5], "pairs"),
        ([[1, 0]], "above 0 and at most 1"),
        ([[1, 0.5], [4, 0.25]], "at most layer 3"),
    ],
)
def test_bad_places(places, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(places=places)
    with pytest.raises(ValueError, match=message):
        apply_ailurus(native_vit(), places=places)


def test_places_need_a_method_that_can():
    model = tiny_model(AiluRusModel, places=TWICE, grouping="density_peaks")
    with pytest.raises(ValueError, match="can merge what is merged, 'region_merging'; got 'density_peaks'"):
        model(random_images())
    with pytest.raises(StrictDataclassError, match="use stage_keep_ratios"):
        tiny_segformer_config(places=TWICE)


def test_features_may_be_chosen():
    images, seen = random_images(), []

    def spy(tokens, grid, num_groups, settings, context):
        seen.append((tokens, features(tokens, settings, context)))
        return GROUPINGS["grid"].assign(tokens, grid, num_groups, settings, context)

    with registered("spy", spy):
        model = tiny_model(AiluRusModel, grouping="spy")
        calls = []
        norm = model.layers[2].layernorm_before
        norm.register_forward_hook(lambda *_: calls.append(1))
        for choice in (None, "raw", "norm"):
            model(images, grouping_features=choice)
        assert len(calls) == 3  # of the layer itself only
    assert all(tokens is chosen for tokens, chosen in seen[:2])
    assert torch.equal(seen[2][1], norm(seen[2][0]))
    with pytest.raises(ValueError, match="needs 'norm'"):
        reduce(tokens_on(GRID), GRID, 10, AdaptiveResolutionSettings(grouping_features="norm"))
    assert reduce(tokens_on(GRID), GRID, 10, AdaptiveResolutionSettings(grouping="region_merging")) is not None


class Scorer(nn.Module):
    """A method with parameters: the tokens with the highest scores stay."""

    def __init__(self, config):
        super().__init__()
        self.score = nn.Linear(config.hidden_size, 1)

    def forward(self, tokens, grid, num_groups, settings, context):
        kept = self.score(tokens)[..., 0].topk(num_groups, dim=1).indices
        index = kept[..., None].expand(-1, -1, tokens.shape[-1])
        return Reduction(
            tokens=tokens.gather(1, index) * self.score(tokens).gather(1, kept[..., None]).sigmoid(),
            log_sizes=torch.zeros(kept.shape),
            restore=lambda short: tokens.scatter(1, index, short),
            kept_positions=lambda: kept,
        )


def test_a_method_may_have_parameters(tmp_path):
    with registered("scorer", Grouping(build=Scorer)):
        model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.25, grouping="scorer")
        assert "ailurus.reducer.score.weight" in model.state_dict()
        model(random_images()).logits.sum().backward()
        assert model.ailurus.reducer.score.weight.grad.abs().sum() > 0
        model.save_pretrained(tmp_path)
        again = AiluRusForSemanticSegmentation.from_pretrained(tmp_path)
        assert torch.equal(again(random_images()).logits, model(random_images()).logits)
        with with_budget(model, grouping="grid"):
            assert model(random_images()).assignment is not None
        without = tiny_model(AiluRusModel)
        with with_budget(without, grouping="scorer"), pytest.raises(ValueError, match="built without them"):
            without(random_images())


def test_what_a_method_may_ask_for():
    seen = {}

    def curious(tokens, grid, num_groups, settings, context):
        seen.update({name: context.require(name) for name in ("norm", "previous")})
        seen.update({name: getattr(context, name) for name in ("keys", "class_attention", "protect", "seed")})
        seen["tokens"] = tokens
        return GROUPINGS["grid"].assign(tokens, grid, num_groups, settings, context)

    protect = torch.zeros(2, 36, dtype=torch.bool)
    with registered("curious", Grouping(assign=curious, takes=("protect", "seed"))):
        model = tiny_model(AiluRusModel, grouping="curious")
        with with_budget(model, protect=protect, seed=3):
            output = model(random_images(), output_hidden_states=True)
        layer, dense = model.layers[2], output.hidden_states[2]
        assert seen["norm"] is layer.layernorm_before
        assert torch.equal(seen["previous"](), output.hidden_states[1][:, 1:])
        assert torch.equal(seen["tokens"], dense[:, 1:])
        normed = layer.layernorm_before(dense)
        torch.testing.assert_close(seen["keys"](), layer.attention.k_proj(normed)[:, 1:])
        model.set_attn_implementation("eager")
        with with_budget(model, keep_ratio=1):
            weights = model(random_images(), output_attentions=True).attentions[2]
        torch.testing.assert_close(seen["class_attention"](), weights[:, :, 0, 1:].mean(1), rtol=1e-4, atol=1e-6)
        assert seen["protect"] is protect
        assert seen["seed"] == 3
        adapted = apply_ailurus(native_vit(), cluster_layer=1, keep_ratio=0.25, grouping="curious")
        states = adapted(random_images(), output_hidden_states=True).hidden_states
        assert seen["norm"] is adapted.layers[1].layernorm_before
        assert torch.equal(seen["previous"](), states[0][:, 1:])
        assert seen["keys"] is None
        hierarchical = tiny_segformer(AiluRusSegformerModel, grouping="curious")
        hierarchical(random_images(2, 64, 64))
        assert seen["norm"] is hierarchical.stages[3].blocks[1].layernorm_before


def test_hints_that_a_method_does_not_heed_are_refused():
    model = tiny_model(AiluRusModel, grouping="density_peaks")
    message = "grouping 'density_peaks' does not heed 'protect'; those that do: region_merging"
    with with_budget(model, protect=torch.ones(2, 36, dtype=torch.bool)), pytest.raises(ValueError, match=message):
        model(random_images())
    with pytest.raises(ValueError, match="this grouping needs 'keys', which this encoder does not have"):
        ReductionContext().require("keys")


def test_registering():
    with pytest.raises(ValueError, match="grouping 'grid' is registered already"):
        register_grouping("grid", soft)
    with pytest.raises(ValueError, match="must have one of assign, reduce and build"):
        Grouping()
    with pytest.raises(Exception, match=r"must be one of 'density_peaks', 'region_merging', 'grid', got 'gird'"):
        tiny_config(grouping="gird")
    with registered(
        "mine", lambda tokens, grid, num_groups, *_: GROUPINGS["grid"].assign(tokens, grid, num_groups, *_)
    ):
        assert tiny_config(grouping="mine").grouping == "mine"
    assert "mine" not in GROUPINGS


def test_a_sequence_in_another_order():
    """Tokens that stand shuffled are reduced as on their grid, and come back to their places."""
    tokens, order = tokens_on((6, 8)), torch.stack([torch.randperm(48) for _ in range(2)])
    shuffled = torch.empty_like(tokens).scatter(1, order[..., None].expand_as(tokens), tokens)
    prefix = torch.ones(2, 3, 8)
    settings = AdaptiveResolutionSettings(unfold="copy")
    straight = reduce(tokens, (6, 8), 12, settings)
    sequence = torch.cat([prefix, shuffled, prefix[:, :1]], dim=1)
    reduction = reduce_sequence(sequence, (6, 8), 12, settings, num_prefix=3, num_suffix=1, order=order)
    assert torch.equal(reduction.tokens[:, 3:-1], straight.tokens)
    assert torch.equal(reduction.log_sizes[:, 3:-1], straight.log_sizes)
    back = reduction.restore(reduction.tokens)
    assert torch.equal(back[:, 3:-1].gather(1, order[..., None].expand_as(tokens)), straight.restore(straight.tokens))
    kept = reduction.kept_positions()
    assert kept[:, :3].tolist() == [[0, 1, 2]] * 2
    assert kept[:, -1].tolist() == [51, 51]
    assert torch.equal(
        sequence.gather(1, kept[..., None].expand(-1, -1, 8))[:, 3:-1],
        tokens.gather(1, straight.kept_positions()[..., None].expand(-1, -1, 8)),
    )


def test_restoring_follows_the_groups():
    tokens = tokens_on((6, 8))
    reduction = reduced(tokens, (6, 8), 12, "density_peaks")
    outputs = torch.randn(2, 12, 8)
    expected = unfold_tokens(outputs, reduction.groups) + tokens - unfold_tokens(reduction.tokens, reduction.groups)
    assert torch.equal(reduction.restore(outputs), unfold_tokens(outputs, reduction.groups) + reduction.residual)
    torch.testing.assert_close(reduction.restore(outputs), expected)


def native_vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(image_size=48, patch_size=8, **sizes)).eval()


@pytest.mark.filterwarnings("ignore")  # of tracing: sizes become constants
@pytest.mark.parametrize("settings", [{"keep_ratio": 1}, {"grouping": "grid"}, {}])
def test_traced_where_nobody_looks_at_bits(settings):
    class LastHiddenState(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model(pixels).last_hidden_state

    model, images = LastHiddenState(tiny_model(AiluRusModel, **settings)), random_images()
    if not settings:
        with pytest.raises(RuntimeError, match=r"cannot trace grouping 'region_merging': use torch\.export"):
            torch.jit.trace(model, images)
        return
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.testing.assert_close(traced(images), model(images))
