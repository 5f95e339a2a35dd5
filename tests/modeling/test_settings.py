"""Settings and what holds in their place: for a call, in a context, in a thread."""

import re

import pytest
from torch import nn

from ailurus_hf import with_budget
from ailurus_hf.budget import keep_ratio_of, set_keep_ratio
from ailurus_hf.modeling.settings import CompressedSizeSettings, resolve_num_groups


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "count", "expected"),
    [(1200, 0.5, None, 600), (1200, 0.25, None, 300), (5, 0.5, None, 3), (3, 0.01, None, 1), (9, 1, None, 9),
     (9, 0.5, 4, 4), (9, 0.5, 100, 9)],
)  # fmt: skip
def test_number_of_groups(num_tokens, ratio, count, expected):
    assert resolve_num_groups(num_tokens, ratio, count) == expected


class OfCompressedSize(nn.Module):
    """A model whose budget is no share of the tokens."""

    def __init__(self):
        super().__init__()
        self.config = CompressedSizeSettings(compressed_size=(3, 4))


class TestCompressedSize:
    def test_it_holds_for_a_call_in_a_block_and_from_an_assignment(self):
        model = OfCompressedSize()
        assert model.config.current({"compressed_size": 5, "other": 1}).compressed_size == 5
        with with_budget(model, compressed_size=[2, 2]):
            assert model.config.current().compressed_size == [2, 2]
            assert model.config.current({"compressed_size": (6, 6)}).compressed_size == (6, 6)
        assert model.config.current() is model.config
        model.config.compressed_size = 9
        assert model.config.current().compressed_size == 9

    @pytest.mark.parametrize("wrong", [0, -1, (3, 0), 2.5, "5", [2.0, 3.0]])
    def test_what_is_no_size_is_refused(self, wrong):
        with (
            pytest.raises(ValueError, match=r"settings of LookupViT: .*compressed_size"),
            with_budget(OfCompressedSize(), compressed_size=wrong),
        ):
            pass

    def test_settings_of_other_methods_are_unknown_to_it(self):
        model = OfCompressedSize()
        for name in ("keep_ratio", "seed"):
            with (
                pytest.raises(TypeError, match=f"OfCompressedSize has no setting '{name}'"),
                with_budget(model, **{name: 0.5}),
            ):
                pass
        for read in (keep_ratio_of, lambda model: set_keep_ratio(model, 0.5)):
            with pytest.raises(TypeError, match=re.escape("OfCompressedSize has no keep_ratio: its budget is another")):
                read(model)
