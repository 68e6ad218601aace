"""The targets of calls from one loaded shared library into another (64-bit Linux).

A shared library calls the functions of others through a table of addresses, one slot for each function, which the
dynamic linker fills. Source: System V Application Binary Interface, "Dynamic Linking"; `man 3 dlinfo`, `man 3 dladdr`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Collection

_RTLD_DI_LINKMAP = 2
# Tags of the dynamic section.
_DT_NULL, _DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL = 0, 2, 5, 6, 23
_ENTRY = struct.Struct("=qQ")
_RELOCATION = struct.Struct("=QQq")
_SYMBOL_SIZE = 24


class _LinkMap(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("path", ctypes.c_char_p), ("dynamic_section", ctypes.c_void_p)]


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
    try:
        handle = ctypes.CDLL(library, mode=os.RTLD_NOLOAD)._handle
    except OSError:
        return {}
    link_map = ctypes.POINTER(_LinkMap)()
    ctypes.CDLL(None).dlinfo(ctypes.c_void_p(handle), _RTLD_DI_LINKMAP, ctypes.byref(link_map))
    base, section = link_map.contents.base, {}
    position = link_map.contents.dynamic_section
    while (entry := _ENTRY.unpack(ctypes.string_at(position, _ENTRY.size)))[0] != _DT_NULL:
        section[entry[0]] = entry[1]
        position += _ENTRY.size
    if _DT_JMPREL not in section:
        return {}
    # glibc turns these offsets into addresses when it loads a library, musl does not.
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
    """Redirect calls through a slot to ``address``; its page stays writable.

    Raises:
        OSError: the system does not allow it.
    """
    # The linker protects the slots of libraries that are linked with `-z now`.
    page, libc = slot & -mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    ctypes.c_uint64.from_address(slot).value = address
