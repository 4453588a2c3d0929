"""The only copy of the 4-bit layout: two codes a byte, the earlier element in the high nibble."""

import torch


def pack_4bit(codes: torch.Tensor, filler: int) -> torch.Tensor:
    """Codes uint8 [n] in 0..15 to bytes uint8 [ceil(n/2), 1]. An odd last element is followed by `filler`."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=filler)
    pairs = codes.view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1]).unsqueeze(1)


def unpack_4bit(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Bytes uint8 [ceil(count/2), 1] or flat to codes uint8 [count]."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 15), 1).view(-1)[:count]
