"""The only copy of each bit layout: two 4-bit codes per byte, the first in the high nibble (bitsandbytes) or in the low one (OCP
floats), words of codes, the first in the low bits (compressed-tensors, GPTQ, AWQ), and planes of bits (tables of values).

torch is imported by what works on tensors, since sizes are wanted without it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# AWQ's order of eight columns in a word: slot i holds column AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_4bit(codes: "torch.Tensor", filler: int) -> "torch.Tensor":
    """Codes uint8 [n] in 0..15 to bytes uint8 [ceil(n/2), 1], the first code in the high bits. `filler` follows an odd last one."""
    import torch

    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=filler)
    pairs = codes.view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1]).unsqueeze(1)


def unpack_4bit(packed: "torch.Tensor", count: int) -> "torch.Tensor":
    """Bytes uint8 [ceil(count/2), 1] or flat to codes uint8 [count]."""
    import torch

    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 15), 1).view(-1)[:count]


def pack_pairs(codes: "torch.Tensor") -> "torch.Tensor":
    """Codes uint8 [rows, n] in 0..15, n even, to bytes uint8 [rows, n/2], the first code in the low bits."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_pairs(packed: "torch.Tensor") -> "torch.Tensor":
    """Bytes uint8 [rows, n/2] to codes uint8 [rows, n]."""
    import torch

    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def swap_pairs(packed: "torch.Tensor") -> "torch.Tensor":
    """Bytes uint8 with the two codes of each in the other order."""
    return (packed >> 4) | (packed << 4)


def words_of(count: int, bits: int) -> int:
    """32-bit words for `count` codes."""
    return -(-count * bits // 32)


def pack_words(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Unsigned codes uint8 [rows, n] of 2 to 8 bits to words int32 [rows, ceil(n bits / 32)]. Codes follow each other in a stream
    of bits that begins in the low bits of the first word; of 3, 5, 6 and 7 bits some lie in two words. The last word is padded with
    zeros."""
    import torch

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


def unpack_words(words: "torch.Tensor", bits: int, count: int) -> "torch.Tensor":
    """Words int32 [rows, ceil(count bits / 32)] to unsigned codes uint8 [rows, count]."""
    import torch

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


def to_unsigned(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Signed codes int8 in [-2^(bits-1), 2^(bits-1) - 1] to code + 2^(bits-1), uint8."""
    import torch

    return codes.view(torch.uint8) ^ 0x80 if bits == 8 else (codes + (1 << (bits - 1))).view(torch.uint8)


def to_signed(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Unsigned codes uint8 to code - 2^(bits-1), int8."""
    import torch

    return (codes ^ 0x80).view(torch.int8) if bits == 8 else codes.view(torch.int8) - (1 << (bits - 1))


_UNIT = 64  # columns; rows are padded to units
UNIT_BYTES = {2: 16, 3: 24, 4: 32}  # of a unit of 64 columns, by bits


def plane_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of `pack_planes`."""
    return -(-columns // _UNIT) * UNIT_BYTES[bits]


def pack_planes(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Codes uint8 [rows, columns] of 2, 3 or 4 bits to bytes uint8 [rows, plane_bytes(columns, bits)], in units of 64 columns, the
    last one padded with zeros.

    Of 2 bits, byte j of 16 holds columns j, j + 16, j + 32 and j + 48, from its low bits up. Of 4 bits, byte j of 32 holds column j
    in its low half and j + 32 in its high one. Of 3 bits, a unit is that of the low two bits, and then 8 bytes: bit i of these 64
    is the third bit of column i."""
    import torch

    rows, columns = codes.shape
    units = torch.nn.functional.pad(codes, (0, -columns % _UNIT)).view(rows, -(-columns // _UNIT), _UNIT)
    if bits == 4:
        return (units[..., :32] | (units[..., 32:] << 4)).flatten(1)
    low = (units & 3).unflatten(-1, (4, 16))
    packed = low[..., 0, :] | (low[..., 1, :] << 2) | (low[..., 2, :] << 4) | (low[..., 3, :] << 6)
    if bits == 3:
        third = (units >> 2).unflatten(-1, (8, 8))
        bytes_of_third = torch.zeros_like(third[..., 0])
        for i in range(8):
            bytes_of_third |= third[..., i] << i
        packed = torch.cat((packed, bytes_of_third), -1)
    return packed.flatten(1)


def unpack_planes(packed: "torch.Tensor", bits: int, columns: int) -> "torch.Tensor":
    """Bytes uint8 [rows, plane_bytes(columns, bits)] of `pack_planes` to codes uint8 [rows, columns]."""
    import torch

    units = packed.reshape(len(packed), -(-columns // _UNIT), UNIT_BYTES[bits])
    if bits == 4:
        return torch.cat((units & 15, units >> 4), -1).flatten(1)[:, :columns].contiguous()
    low = units[..., :16]
    codes = torch.cat([low >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    if bits == 3:
        third = torch.stack([units[..., 16:] >> i & 1 for i in range(8)], -1)
        codes |= third.flatten(-2) << 2
    return codes.flatten(1)[:, :columns].contiguous()
