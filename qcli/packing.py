"""The only copy of each bit layout: two 4-bit codes per byte (bitsandbytes), words of signed codes (compressed-tensors)."""

import torch


def pack_4bit(codes: torch.Tensor, filler: int) -> torch.Tensor:
    """Codes uint8 [n] in 0..15 to bytes uint8 [ceil(n/2), 1], the first code in the high bits. `filler` follows an odd last one."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=filler)
    pairs = codes.view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1]).unsqueeze(1)


def unpack_4bit(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Bytes uint8 [ceil(count/2), 1] or flat to codes uint8 [count]."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 15), 1).view(-1)[:count]


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes int8 [rows, n] of 4 or 8 bits to words int32 [rows, ceil(n bits / 32)]. A word holds code + 2^(bits-1), with the
    first code in the low bits. A partial last word is padded with zeros."""
    raw = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % (32 // bits)))
    if bits == 4:
        raw = raw[:, 0::2] | (raw[:, 1::2] << 4)
    return raw.flatten().view(torch.int32).view(len(codes), -1)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Words int32 [rows, ceil(count bits / 32)] to signed codes int8 [rows, count]."""
    raw = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 4:
        raw = torch.stack((raw & 15, raw >> 4), -1).flatten(-2)
    return (raw[:, :count].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
