"""Which weights of a model get which low-bit format.

Read by the converter (convert.py) and by quantizing on load (load.py): the two agree because there
is one recipe. Norms, scalars, the router of experts (a thousandth of the weights, and it decides
which of them are used) and what of the towers is not a linear layer stay floats, as stored.
"""

from dataclasses import dataclass, replace

from torch import nn

from gemsmith.config import Gemma4Config, LayerPlan
from gemsmith.errors import ConfigError
from gemsmith.model.towers import Towers
from gemsmith.quant.formats import Format
from gemsmith.weights.names import EMBEDDING, HEAD, PLE_TABLE, expected_shapes, written_key

BITS = ("8", "4", "2", "mobile", "mixed")
GROUPS = (32, 64, 128)
MIXED = (Format(2, 32), Format(4, 128), Format(4, 64), Format(4, 32))
"""What a mixed recipe chooses from, and int8. 2 bits lose too much in any larger group."""
DEFAULT_GROUP = 32
ON_LOAD = {"int8": "8", "int4": "4", "int2": "2"}
"""What `quant` of `load_model` may be, and the recipe's bits."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which format each weight gets.

    "8": int8 with a scale a row. "4", "2": so many bits in groups. In all three the per-layer
    inputs (PLE) are int8: their projections because 4 bits there double the error of the whole
    model for a hundredth of its size, their table because it stays on disk and costs no memory.
    Linear layers of the towers are int8.

    "mobile": the mix of Google's mobile E2B, one scale a row. Embedding and head, apart, at 2
    bits; attention 4; MLPs 4, or 2 in layers that read another layer's K/V; PLE table 4, PLE
    projections 8, `per_layer_model_projection` as it is. Good only from weights trained for it.
    """

    bits: str
    group: int | None = None
    """None: 32 at 4 and 2 bits, a whole row otherwise."""
    float_tables: bool = False
    """Leave embedding and PLE table as they are, because transformers 5.23 reads no low-bit tables
    in compressed-tensors' layout (it does in the mobile one, with one scale a row)."""
    budget: int | None = None
    """Of a mixed recipe: bytes that all tensors may take in the files, headers apart."""
    chosen: tuple[tuple[str, Format], ...] = ()
    """Of a mixed recipe, once it is known: what each weight of `candidates` gets."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits {self.bits!r}: choose {', '.join(BITS)}")
        if self.group is not None and self.group not in GROUPS:
            raise ConfigError(f"group {self.group}: choose {', '.join(map(str, GROUPS))}")
        if self.bits == "mobile" and self.group is not None:
            raise ConfigError(
                f"group {self.group}: the mobile layout has one scale a row; leave it out"
            )
        if self.mobile and self.float_tables:
            raise ConfigError("float tables: the mobile mix includes its tables; leave it out")
        if self.mixed and self.group is not None:
            raise ConfigError(
                f"group {self.group}: a mixed recipe chooses groups itself; leave it out"
            )
        if self.mixed and (self.budget is None or self.budget < 1):
            raise ConfigError(
                "bits 'mixed' needs a budget: how many bytes all weights may take, such as 3.2GB"
            )
        if self.budget is not None and not self.mixed:
            raise ConfigError(f"a budget is for bits 'mixed', not {self.bits!r}; leave it out")

    @property
    def mobile(self) -> bool:
        return self.bits == "mobile"

    @property
    def mixed(self) -> bool:
        return self.bits == "mixed"

    def candidates(self, config: Gemma4Config) -> dict[str, tuple[Format, ...]]:
        """Of a mixed recipe: the formats that each weight it decides on may get, by name.

        Groups that do not divide a weight's rows are none; with none left, 4 bits have one scale a
        row.
        """
        text = config.text_config
        wide = replace(self, bits="8", budget=None, chosen=()).formats(config)
        out: dict[str, tuple[Format, ...]] = {}
        for name, shape in expected_shapes(text).items():
            if name not in wide or ("per_layer" in name and name != PLE_TABLE):
                continue
            P = text.hidden_size_per_layer_input
            K = P if name == PLE_TABLE else shape[-1]
            fits = tuple(f for f in MIXED if f.group and K % f.group == 0)
            if name == PLE_TABLE:
                fits = tuple(f for f in fits if f.bits > 2) or (Format(4, P),)
            else:
                fits = tuple(f.stepped(K) for f in fits)
            out[name] = (*(fits or (Format(4),)), wide[name])
        return out

    def formats(self, config: Gemma4Config) -> dict[str, Format]:
        """The format of each weight that gets one, by name (towers' below `model.`).

        Raises:
          ConfigError: groups do not divide a weight's rows, named; experts in the mobile layout.
        """
        text = config.text_config
        if self.mobile and text.enable_moe_block:
            raise ConfigError("bits 'mobile': its layout has no place for experts; use 4")
        if self.mixed:
            return replace(self, bits="8", budget=None, chosen=()).formats(config) | dict(
                self.chosen
            )
        out: dict[str, Format] = {}
        for name, shape in expected_shapes(text).items():
            format = self._format(name, text.layers, text.hidden_size_per_layer_input)
            if len(shape) > 1 and format is not None:
                format.groups(shape[-1], written_key(name))
                out[name] = format.stepped(shape[-1])
        for name, module in Towers(config, device="meta").named_modules():
            if isinstance(module, nn.Linear):
                out[f"{name}.weight"] = Format(8)
        return out

    def leaves(self, key: str) -> bool:
        """Whether the matrix of this key stays floats by intent, the router apart."""
        if self.mobile:
            return key.endswith("per_layer_model_projection.weight")
        return self.float_tables and key in (written_key(EMBEDDING), written_key(PLE_TABLE))

    def _format(self, name: str, plans: tuple[LayerPlan, ...], P: int) -> Format | None:
        if ".router." in name or (self.float_tables and name in (EMBEDDING, PLE_TABLE)):
            return None
        if name == PLE_TABLE:
            return Format(4) if self.mobile else Format(8, P)
        if name == "per_layer_model_projection.weight":
            return None if self.mobile else Format(8)
        if "per_layer" in name:
            return Format(8)
        if not self.mobile:
            group = self.group or (None if self.bits == "8" else DEFAULT_GROUP)
            return Format(int(self.bits), group)
        if ".mlp." in name:
            return Format(4 if plans[int(name.split(".")[1])].owns_kv else 2)
        return Format(2 if name in (EMBEDDING, HEAD) else 4)


def recipe_on_load(quant: str) -> Recipe:
    """The recipe of `load_model(quant=...)`: that of `gemsmith quantize --bits`.

    Raises:
      ConfigError: no such value.
    """
    if quant not in ON_LOAD:
        raise ConfigError(f"quant {quant!r}: must be {', '.join(ON_LOAD)}, or None for floats")
    return Recipe(ON_LOAD[quant])
