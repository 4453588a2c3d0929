"""The only copy of each bit layout: two 4-bit codes per byte, the first in the high nibble (bitsandbytes) or in the low one (OCP
floats), words of codes, the first in the low bits (compressed-tensors, GPTQ, AWQ), and planes of 64 columns (qcli)."""

import torch

from qcli.schemes import PLANE

# AWQ's order of eight columns in a word: slot i holds column AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [rows, n] in 0..15, n even, to bytes uint8 [rows, n/2], the first code in the low bits."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [rows, n/2] to codes uint8 [rows, n]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def swap_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 with the two codes of each in the other order."""
    return (packed >> 4) | (packed << 4)


def words_of(count: int, bits: int) -> int:
    """32-bit words for `count` codes."""
    return -(-count * bits // 32)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes uint8 [rows, n] of 2 to 8 bits to words int32 [rows, ceil(n bits / 32)]. Codes follow each other in a stream
    of bits that begins in the low bits of the first word; of 3, 5, 6 and 7 bits some lie in two words. The last word is padded with
    zeros."""
    rows, count = codes.shape
    if bits in (2, 4, 8):
        codes = torch.nn.functional.pad(codes, (0, -count % (32 // bits)))
        while bits < 8:
            codes, bits = codes[:, 0::2] | (codes[:, 1::2] << bits), 2 * bits
        return codes.contiguous().flatten().view(torch.int32).view(rows, -1)
    whole = torch.nn.functional.pad(codes, (0, -count % 32)).view(-1, 32).to(torch.int64)
    words = torch.zeros(len(whole), bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= whole[:, i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= whole[:, i] >> (32 - shift)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.view(rows, -1)[:, : words_of(count, bits)].contiguous()


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Words int32 [rows, ceil(count bits / 32)] to unsigned codes uint8 [rows, count]."""
    rows = len(words)
    if bits in (2, 4, 8):
        found, width = words.contiguous().flatten().view(torch.uint8).view(rows, -1), 8
        while width > bits:
            width //= 2
            found = torch.stack((found & ((1 << width) - 1), found >> width), -1).flatten(-2)
        return found[:, :count].contiguous()
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(-1, bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(len(padded), 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        found = padded[:, word] >> shift
        if shift + bits > 32:
            found |= padded[:, word + 1] << (32 - shift)
        codes[:, i] = found & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :count].contiguous()


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes uint8 [rows, columns] of 2, 3 or 4 bits to bytes uint8 [rows, plane_bytes(columns, bits)].

    A row is padded with zeros to units of 64 columns. Byte j of a unit has, from its low bits up:
      2 bits   columns j, j + 16, j + 32 and j + 48: 16 bytes
      3 bits   the same 16 bytes of the low two bits, then 8 bytes whose bit i is the third bit of column i, counted over all 64
      4 bits   columns j and j + 32: 32 bytes
    """
    rows, columns = codes.shape
    units = torch.nn.functional.pad(codes, (0, -columns % PLANE)).view(rows, -1, PLANE)
    if bits == 4:
        low, high = units.chunk(2, -1)
        return (low | high << 4).flatten(1)
    a, b, c, d = (units & 3).chunk(4, -1)
    low = a | b << 2 | c << 4 | d << 6
    if bits == 2:
        return low.flatten(1)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    third = (units >> 2).unflatten(-1, (-1, 8)).mul(weights).sum(-1, dtype=torch.uint8)
    return torch.cat((low, third), -1).flatten(1)


def unpack_planes(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Bytes uint8 [rows, plane_bytes(columns, bits)] to unsigned codes uint8 [rows, columns]."""
    units = packed.view(len(packed), -1, PLANE * bits // 8)
    if bits == 4:
        codes = torch.cat((units & 15, units >> 4), -1)
    else:
        low = units[..., :16]
        codes = torch.cat([low >> shift & 3 for shift in (0, 2, 4, 6)], -1)
        if bits == 3:
            shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
            codes |= (units[..., 16:].unsqueeze(-1) >> shifts & 1).flatten(-2) << 2
    return codes.flatten(1)[:, :columns].contiguous()


def to_unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes int8 in [-2^(bits-1), 2^(bits-1) - 1] to code + 2^(bits-1), uint8."""
    return codes.view(torch.uint8) ^ 0x80 if bits == 8 else (codes + (1 << (bits - 1))).view(torch.uint8)


def to_signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes uint8 to code - 2^(bits-1), int8."""
    return (codes ^ 0x80).view(torch.int8) if bits == 8 else codes.view(torch.int8) - (1 << (bits - 1))
