"""What this machine's processor does well."""


def fast_bfloat16() -> bool:
    """Whether it multiplies bfloat16 faster than float32."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)
