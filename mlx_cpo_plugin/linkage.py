"""The targets of calls from one loaded shared library into another (64-bit Linux).

A shared library calls the functions of others through a table of addresses, one slot for each function, which the
dynamic linker fills. Source: System V Application Binary Interface, "Dynamic Linking"; `man 3 dlinfo`, `man 3 dladdr`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

_MAPPINGS = Path("/proc/self/maps")
_PROT_READ, _PROT_WRITE = 1, 2
_RTLD_DI_LINKMAP = 2
# Tags of the dynamic section.
_DT_NULL, _DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_PLTREL, _DT_JMPREL = 0, 2, 5, 6, 20, 23
_DT_RELA = 7
_ENTRY = struct.Struct("=qQ")
_RELOCATION = struct.Struct("=QQq")
_SYMBOL_SIZE = 24


class _LinkMap(ctypes.Structure):
    pass


_LinkMap._fields_ = [
    ("base", ctypes.c_uint64),
    ("path", ctypes.c_char_p),
    ("dynamic_section", ctypes.c_void_p),
    ("next", ctypes.POINTER(_LinkMap)),
]


class _SymbolInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def call_slots(library: str, names: Collection[str]) -> dict[str, int]:
    """Return the addresses of the slots through which a library calls the functions ``names``.

    Functions that it does not call through such a slot are left out; the result is empty if it is not loaded.

    Args:
        library: the name of its file, such as ``libmlx.so``.
    """
    link_map = next(
        (loaded for loaded in _loaded_libraries() if os.path.basename(loaded.path) == library.encode()), None
    )
    if link_map is None or struct.calcsize("P") != 8:
        return {}
    section = _dynamic_section(link_map)
    if section.get(_DT_PLTREL) != _DT_RELA:
        return {}
    # glibc turns these offsets into addresses when it loads a library, musl does not.
    base = link_map.base
    symbols, strings, relocations = (
        section[tag] if section[tag] >= base else section[tag] + base for tag in (_DT_SYMTAB, _DT_STRTAB, _DT_JMPREL)
    )
    slots = {}
    for offset, info, _ in _RELOCATION.iter_unpack(ctypes.string_at(relocations, section[_DT_PLTRELSZ])):
        name_offset = ctypes.c_uint32.from_address(symbols + _SYMBOL_SIZE * (info >> 32)).value
        name = ctypes.string_at(strings + name_offset).decode(errors="replace")
        if name in names:
            slots[name] = base + offset
    return slots


def _loaded_libraries() -> Iterator[_LinkMap]:
    program = ctypes.CDLL(None)
    link_map = ctypes.POINTER(_LinkMap)()
    if program.dlinfo(ctypes.c_void_p(program._handle), _RTLD_DI_LINKMAP, ctypes.byref(link_map)):
        return
    while link_map:
        yield link_map.contents
        link_map = link_map.contents.next


def _dynamic_section(link_map: _LinkMap) -> dict[int, int]:
    """Tag -> value."""
    entries: dict[int, int] = {}
    position = link_map.dynamic_section
    while True:
        tag, value = _ENTRY.unpack(ctypes.string_at(position, _ENTRY.size))
        if tag == _DT_NULL:
            return entries
        entries[tag] = value
        position += _ENTRY.size


def target(slot: int) -> int:
    """Return the address that calls through a slot go to."""
    return ctypes.c_uint64.from_address(slot).value


def file_of(address: int) -> str:
    """Return the path of the loaded library that contains ``address``; empty where none does."""
    found = _SymbolInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(found)):
        return ""
    return os.fsdecode(found.file)


def redirect(slot: int, address: int) -> None:
    """Redirect calls through a slot to ``address``.

    Raises:
        OSError: the system does not allow it.
    """
    writable = _is_writable(slot)
    if not writable:  # the linker protects the slots of libraries that are linked with `-z now`
        _protect(slot, _PROT_READ | _PROT_WRITE)
    ctypes.c_uint64.from_address(slot).value = address
    if not writable:
        _protect(slot, _PROT_READ)


def _is_writable(address: int) -> bool:
    for line in _MAPPINGS.read_text(errors="replace").splitlines():
        bounds, permissions, *_ = line.split()
        first, end = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < end:
            return "w" in permissions
    raise OSError(f"nothing is mapped at {address:#x}")


def _protect(address: int, protection: int) -> None:
    page = address & -mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")
