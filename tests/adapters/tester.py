"""What must hold for every family of encoders; a family adds a `Case` and gets all of it.

class TestMine(FamilyTests):
    cases = [Case("mine", MineModel, MineConfig, {"hidden_size": 32, ...})]
"""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.adapters import controller as controller_module
from ailurus_hf.adapters import map_layers
from ailurus_hf.adapters.controller import controllers_of
from ailurus_hf.modeling.reduction import GROUPINGS, Grouping, Reduction, reduce_to_groups, registered
from ailurus_hf.modeling.token_groups import group_tokens
from tests.factories import random_images

STATES = (controller_module._STATES, map_layers._STATES)
HOOK_TABLES = [
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
]


def images(batch_size: int) -> dict[str, Tensor]:
    """Inputs of most models: images of 48 x 64 pixels, 6 x 8 patches of 8."""
    return {"pixel_values": random_images(batch_size, 48, 64)}


def square_images(batch_size: int) -> dict[str, Tensor]:
    """For models that know squares only."""
    return {"pixel_values": random_images(batch_size, 64, 64)}


@dataclass(frozen=True)
class Case:
    """A tiny model of a family.

    Args:
        name: names the case in the report.
        model_class: the native class.
        config: makes its configuration from `settings`.
        settings: of the configuration.
        inputs: batch size -> inputs of the model.
        cluster_layer: where the tests merge.
        num_suffix: number of tokens behind the patches.
        compiled: whether it is compiled and exported in every run of the tests; the others are by `make test-slow`.
    """

    name: str
    model_class: Any
    config: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], dict[str, Any]] = images
    cluster_layer: int = 1
    num_suffix: int = 0
    compiled: bool = False

    def model(self) -> Any:
        """A model with random weights, the same for every call, in evaluation mode."""
        torch.manual_seed(0)
        model = self.model_class(self.config(**self.settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms, biases, LayerScale, and tables that start as zeros would hide mistakes.
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    def adapted(self, keep_ratio: float = 0.25, **settings: Any) -> Any:
        return apply_ailurus(self.model(), cluster_layer=self.cluster_layer, keep_ratio=keep_ratio, **settings)


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of the model's output, hidden states included, by name."""
    with torch.no_grad():
        return tensors(model(**inputs, output_hidden_states=True))


def tensors(output: Any) -> dict[str, Tensor]:
    return dict(_tensors("", output))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, tuple | list):
        for key, item in enumerate(value):
            yield from _tensors(f"{name}.{key}", item)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Within `tolerance` of each tensor's largest value (at least 1)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        difference = (actual[name].double() - value.double()).abs().max()
        assert difference <= tolerance * max(value.abs().max().item(), 1), (name, difference)


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first)


def random_permutation(tokens: Tensor, *_: Any) -> Reduction:
    """As many groups as tokens, each of one token, in another order for every image."""
    batch_size, num_tokens, _ = tokens.shape
    groups = group_tokens(torch.stack([torch.randperm(num_tokens) for _ in range(batch_size)]), num_tokens)
    return reduce_to_groups(tokens, groups)


def every_member(tokens: Tensor, grid: Any, num_groups: int, settings: Any, context: Any) -> Reduction:
    """Region merging, but every member stays, with the mean of its group and the place of its representative."""
    assignment, representatives = GROUPINGS["region_merging"].assign(tokens, grid, num_groups, settings, context)
    groups = group_tokens(assignment, num_groups, representatives)
    merged = reduce_to_groups(tokens, groups, settings.unfold)

    def merge(grid_tokens: Tensor) -> Tensor:
        return merged.spread(merged.merge(grid_tokens))

    return Reduction(
        tokens=merge(tokens),
        log_sizes=torch.zeros(tokens.shape[:2]),
        restore=lambda members: members if merged.residual is None else members + merged.residual,
        kept_positions=lambda: representatives.gather(1, assignment),
        merge=merge,
        spread=lambda members: members,
        residual=merged.residual,
    )


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that an adapter could leave on a model."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name, "attributes"] = sorted(vars(module))
        for table in HOOK_TABLES:
            found[name, table] = list(getattr(module, table).items())
        config = getattr(module, "config", None)
        if config is not None:
            found[name, "config"] = repr(sorted(vars(config).items(), key=lambda item: item[0]))
    return found


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of all parameters for a loss in which every output takes part."""
    model.zero_grad()
    torch.manual_seed(0)  # augmentation of rotary positions, dropout
    values = tensors(model(**inputs, output_hidden_states=True)).values()
    sum(value.square().mean() for value in values if value.is_floating_point()).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def checkpoint_layers(model: Any, use_reentrant: bool) -> None:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


class FamilyTests:
    """The tests; a subclass gives `cases`."""

    cases: ClassVar[list[Case]]

    def test_keeping_all_tokens_changes_no_bit(self, case):
        model, inputs = case.model(), case.inputs(2)
        plain = outputs(model, inputs)
        apply_ailurus(model, keep_ratio=1, cluster_layer=case.cluster_layer)
        assert_equal(outputs(model, inputs), plain)

    def test_the_order_of_merged_tokens_does_not_matter(self, case):
        model, inputs = case.model(), case.inputs(2)
        plain = outputs(model, inputs)
        with registered("permutation", Grouping(reduce=random_permutation)):
            apply_ailurus(model, cluster_layer=case.cluster_layer, grouping="permutation")
            assert_close(outputs(model, inputs), plain)

    def test_a_quarter_of_the_tokens_keeps_every_shape(self, case):
        model, inputs = case.model(), case.inputs(2)
        plain = outputs(model, inputs)
        merged = outputs(apply_ailurus(model, keep_ratio=0.25, cluster_layer=case.cluster_layer), inputs)
        assert {name: value.shape for name, value in merged.items()} == {n: value.shape for n, value in plain.items()}
        assert differ(merged, plain)
        assert all(value.isfinite().all() for value in merged.values())

    def test_a_merged_token_counts_as_its_members(self, case):
        """The same as when every member stays, with the mean of its group and the place of its representative."""
        # In double precision, but for the logarithms of sizes: sums of other lengths round otherwise.
        inputs = in_dtype(case.inputs(2), torch.float64)
        merged = outputs(case.adapted().double(), inputs)
        with registered("every member", Grouping(reduce=every_member, features="norm")):
            members = outputs(case.adapted(grouping="every member").double(), inputs)
        assert_close(members, merged, 1e-6)

    def test_layers_run_on_merged_tokens(self, case):
        model, lengths = case.adapted(), {}
        for controller in controllers_of(model):
            for index, layer in enumerate(controller.layers):
                layer.register_forward_pre_hook(
                    lambda _, args, index=index: lengths.update({index: args[0].shape[1]}) or None
                )
        outputs(model, case.inputs(1))
        assert lengths[case.cluster_layer] < lengths[0] / 2
        assert lengths[max(lengths)] == lengths[case.cluster_layer]

    def test_only_patches_are_merged(self, case):
        model, seen = case.adapted(num_clusters=1), {}
        layer = controllers_of(model)[0].layers[case.cluster_layer]
        layer.register_forward_pre_hook(lambda _, args: seen.update(full=args[0]), prepend=True)
        layer.register_forward_pre_hook(lambda _, args: seen.update(merged=args[0]))
        outputs(model, case.inputs(2))
        full, merged = seen["full"], seen["merged"]
        num_prefix = merged.shape[1] - 1 - case.num_suffix
        prefix, patches, suffix = full.tensor_split([num_prefix, full.shape[1] - case.num_suffix], dim=1)
        expected = torch.cat([prefix, patches.mean(1, keepdim=True), suffix], dim=1)
        assert_close({"": merged}, {"": expected})

    def test_removing_restores_the_model(self, case):
        model, inputs = case.model(), case.inputs(2)
        plain = outputs(model, inputs)  # transformers installs its recording hooks here
        before = traces(model)
        apply_ailurus(model, keep_ratio=0.25, cluster_layer=case.cluster_layer)
        outputs(model, inputs)
        assert traces(model) != before
        assert remove_ailurus(model) is model
        assert traces(model) == before
        assert_equal(outputs(model, inputs), plain)

    def test_applying_twice_is_applying_once(self, case):
        once, twice, inputs = case.adapted(), case.adapted(), case.inputs(2)
        apply_ailurus(twice)
        assert twice.config.ailurus == once.config.ailurus
        assert len(controllers_of(twice)) == len(controllers_of(once))
        assert_equal(outputs(twice, inputs), outputs(once, inputs))

    def test_a_changed_ratio_takes_effect(self, case):
        model, inputs = case.adapted(), case.inputs(2)
        quarter = outputs(model, inputs)
        model.config.ailurus["keep_ratio"] = 0.5
        half = outputs(model, inputs)
        assert differ(half, quarter)
        assert_equal(outputs(apply_ailurus(model, keep_ratio=0.25), inputs), quarter)
        assert_equal(outputs(apply_ailurus(model, keep_ratio=0.5), inputs), half)

    def test_checkpoints_stay_native(self, case, tmp_path):
        model, inputs = case.adapted(), case.inputs(2)
        assert model.state_dict().keys() == case.model().state_dict().keys()
        model.save_pretrained(tmp_path / "adapted")
        case.model().save_pretrained(tmp_path / "plain")
        # The attention implementation is an argument of loading; checkpoints do not keep it.
        eager = case.model().config._attn_implementation == "eager"
        kwargs = {"attn_implementation": "eager"} if eager else {}
        adapted, plain = (
            case.model_class.from_pretrained(tmp_path / name, **kwargs).eval() for name in ("adapted", "plain")
        )
        assert_equal(outputs(adapted, inputs), outputs(plain, inputs))
        assert adapted.config.ailurus == model.config.ailurus
        apply_ailurus(adapted)
        assert_equal(outputs(adapted, inputs), outputs(apply_ailurus(plain, **model.config.ailurus), inputs))

    def test_copies_are_independent(self, case):
        model, inputs = case.adapted(), case.inputs(2)
        merged = outputs(model, inputs)
        twin = copy.deepcopy(model)
        assert_equal(outputs(twin, inputs), merged)
        twin.config.ailurus["keep_ratio"] = 0.5
        assert differ(outputs(twin, inputs), merged)
        assert_equal(outputs(model, inputs), merged)
        assert_equal(outputs(remove_ailurus(twin), inputs), outputs(case.model(), inputs))
        assert_equal(outputs(model, inputs), merged)

    def test_a_model_that_ran_is_freed(self, case):
        model = case.adapted()
        outputs(model, case.inputs(1))
        freed = weakref.ref(model)
        del model
        gc.collect()
        assert freed() is None

    def test_images_do_not_see_each_other(self, case):
        # In double precision: sums of other shapes round otherwise, and groups are decided by comparisons.
        model, inputs = case.adapted().double(), in_dtype(case.inputs(3), torch.float64)
        together = outputs(model, inputs)
        for index in range(3):
            alone = outputs(model, {name: value[index : index + 1] for name, value in inputs.items()})
            for name, value in alone.items():
                if value.ndim and together[name].shape[0] == 3:
                    assert_close({name: value}, {name: together[name][index : index + 1]})

    def test_half_precision(self, case):
        model, inputs = case.adapted().bfloat16(), case.inputs(2)
        full = outputs(case.adapted(), inputs)
        half = outputs(model, in_dtype(inputs, torch.bfloat16))
        assert {name: value.shape for name, value in half.items()} == {name: v.shape for name, v in full.items()}
        assert all(value.isfinite().all() for value in half.values())

    def test_an_exception_inside_leaves_the_next_call_alone(self, case):
        model, inputs = case.adapted(), case.inputs(2)
        merged = outputs(model, inputs)
        layer = controllers_of(model)[0].layers[-1]

        leaf = next(module for module in layer.modules() if not [*module.children()])

        def fail(error: type[BaseException], *_: Any) -> None:
            raise error

        for module, error in ((layer, ZeroDivisionError), (leaf, ZeroDivisionError), (leaf, KeyboardInterrupt)):
            handle = module.register_forward_hook(partial(fail, error))
            with pytest.raises(error):
                outputs(model, inputs)
            handle.remove()
            if error is ZeroDivisionError:  # after an interruption the next forward does it
                keys = [*controllers_of(model), *model.modules()]
                assert not any(key in states._all() for key in keys for states in STATES)
            model.config.ailurus["keep_ratio"] = 1
            assert_equal(outputs(model, inputs), outputs(case.model(), inputs))
            model.config.ailurus["keep_ratio"] = 0.25
            assert_equal(outputs(model, inputs), merged)
        assert_equal(outputs(remove_ailurus(model), inputs), outputs(case.model(), inputs))

    @pytest.mark.parametrize("accelerate_first", [True, False])
    def test_accelerate_may_hook_the_layers_too(self, case, accelerate_first):
        model, inputs = case.model(), case.inputs(2)

        def hook():
            for module in [*model.modules()][1:]:
                add_hook_to_module(module, ModelHook())

        if accelerate_first:
            hook()
        apply_ailurus(model, keep_ratio=0.25, cluster_layer=case.cluster_layer)
        if not accelerate_first:
            hook()
        assert_equal(outputs(model, inputs), outputs(case.adapted(), inputs))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, case, use_reentrant):
        # In double precision, where a wrong gradient cannot hide behind the rounding of sums in another order.
        model, inputs = case.adapted().double().train(), in_dtype(case.inputs(2), torch.float64)
        if not model.supports_gradient_checkpointing:
            pytest.skip("the model has no gradient checkpointing")
        expected = gradients(model, inputs)
        assert any(value.any() for value in expected.values())
        native = case.model().double().train()
        checkpoint_layers(native, use_reentrant)
        try:
            gradients(native, inputs)
        except (RuntimeError, UserWarning) as error:
            pytest.skip(f"not possible with the native model: {str(error)[:80]}")
        checkpoint_layers(model, use_reentrant)
        largest = max(value.abs().max() for value in expected.values())
        found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert (value - expected[name]).abs().max() <= 1e-12 * largest, name

    def test_threads_share_a_model(self, case):
        model, results = case.adapted(), {}
        batches = [
            {name: value + index if value.is_floating_point() else value for name, value in case.inputs(1).items()}
            for index in range(4)
        ]
        expected = [outputs(model, batch) for batch in batches]

        def work(index):
            for _ in range(5):
                results.setdefault(index, []).append(outputs(model, batches[index]))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, answers in results.items():
            assert len(answers) == 5
            for answer in answers:
                assert_equal(answer, expected[index])

    def test_compiles_to_one_graph(self, case):
        model, inputs = case.adapted(neighborhood_size=8), case.inputs(2)
        merged = outputs(model, inputs)  # transformers installs its recording hooks here; it cannot while compiling
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        try:
            found = outputs(compiled, inputs)
        except torch._dynamo.exc.Unsupported as error:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                outputs(torch.compile(remove_ailurus(model), fullgraph=True, backend="aot_eager"), inputs)
            pytest.skip(f"not possible with the native model: {str(error)[:80]}")
        assert_close(found, merged)
        assert_equal(outputs(model, inputs), merged)
        model.config.ailurus["keep_ratio"] = 0.5
        assert_close(outputs(compiled, inputs), outputs(model, inputs))

    def test_exports_with_a_dynamic_batch(self, case):
        model, inputs = case.adapted(neighborhood_size=8), case.inputs(2)
        try:
            exported = export(model, inputs)
        except (RuntimeError, ValueError, torch._dynamo.exc.UserError) as error:
            with pytest.raises(type(error)):
                export(remove_ailurus(model), inputs)
            pytest.skip(f"not possible with the native model: {str(error)[:80]}")
        with torch.no_grad():
            found, expected = exported(**case.inputs(3)), model(**case.inputs(3))
        assert_close(tensors(found), tensors(expected))


def export(model: Any, inputs: dict[str, Any]) -> Callable[..., Any]:
    batch = {0: torch.export.Dim("batch", min=2, max=16)}
    return torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, batch)).module()
