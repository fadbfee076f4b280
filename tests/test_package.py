"""The package's public names."""

import pytest

NAMES = """
import tapeless as tl
{first}
assert callable(tl.train) and tl.presets["microgpt"].model.n_embd == 16 and tl.GPT and tl.load
from tapeless import presets, train
assert presets is tl.presets and train is tl.train
print("fine")
"""


@pytest.mark.parametrize(
    "first", ["", "import tapeless.presets", "from tapeless.train import Run", "tl.train", "tl.GPT"]
)
def test_public_names_do_not_depend_on_what_was_imported_before(child, first):
    """Importing the submodule `tapeless.presets` must not put a module in the place of `tl.presets`."""
    assert child(NAMES.format(first=first)) == "fine"
