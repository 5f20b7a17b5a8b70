"""Element types by name, so that planning needs no torch.

A dtype is the name of torch's attribute (`"bfloat16"` for `torch.bfloat16`). The safetensors names are those of
safetensors 0.8 (`safetensors/src/tensor.rs`, enum `Dtype`).
"""

from __future__ import annotations

from .errors import OptionError, UnsupportedError
from .sizes import shown

# safetensors name -> (torch name, bits per element). float6 has no torch dtype: such a tensor can be inspected only.
SAFETENSORS_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
SAFETENSORS_NAMES = {name: st for st, (name, _) in SAFETENSORS_DTYPES.items()}
NOT_IN_TORCH = frozenset({"float6_e2m3", "float6_e3m2"})

# Bytes of one torch element; float4_e2m1fn_x2 packs two values in one.
_ITEMSIZE = {name: max(1, bits // 8) for name, bits in SAFETENSORS_DTYPES.values()}
_ITEMSIZE.update(
    {"complex128": 16, "complex32": 4, "bits16": 2, "qint32": 4},
    **dict.fromkeys(("bits8", "bits4x2", "bits2x4", "bits1x8", "qint8", "quint8", "quint4x2", "quint2x4"), 1),
    **{f"{kind}{bits}": 1 for kind in ("int", "uint") for bits in range(1, 8)},
)

# The floats that a cast may start from or end in. The packed and the scale-only formats change meaning when cast.
CASTABLE = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"}
)
_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64", "half": "float16"}


def itemsize(dtype: str) -> int:
    """Bytes of one element of `dtype` as torch counts them.

    Raises:
        UnsupportedError: a dtype of a later torch.
    """
    try:
        return _ITEMSIZE[dtype]
    except KeyError:
        raise UnsupportedError(f"dtype {dtype}: its size is not known; cast the tensor to another dtype") from None


def is_floating(dtype: str) -> bool:
    """Whether `dtype` is a float that a requested dtype acts on."""
    return dtype in CASTABLE


def parse_dtype(value: object, what: str = "dtype") -> str:
    """`"auto"` or the torch name of a float: accepts `torch.bfloat16`, `"bfloat16"`, `"bf16"`, `"torch.bfloat16"`.

    Raises:
        OptionError: not a float dtype that weights can be cast to.
    """
    try:
        name = str(value).removeprefix("torch.")
    except Exception:
        name = ""  # what has no text is no dtype
    name = _ALIASES.get(name, name)
    if name != "auto" and name not in CASTABLE:
        known = ", ".join(sorted(CASTABLE))
        raise OptionError(f"{what}: expected 'auto' or one of {known}; found {shown(value)}")
    return name
