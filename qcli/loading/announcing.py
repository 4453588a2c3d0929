"""Makes transformers read the format `qcli` by itself once both are imported, in either order. `import qcli` itself imports neither
torch nor transformers.

transformers has no entry points. What fills its table of formats must run after transformers' code, and before a model is loaded.
So a finder stands on sys.meta_path until `transformers.modeling_utils` is imported, without which no model is loaded. It finds no
other module.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_AFTER = "transformers.modeling_utils"
_REGISTERS = "qcli.loading.transformers_format"


class _Finder:
    def find_spec(self, name: str, path: "Sequence[str] | None", target: "ModuleType | None" = None) -> "ModuleSpec | None":
        """The spec that the other finders have of the one module; to execute it is to register the format, too."""
        if name != _AFTER:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in finders if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:
        """Makes `loader`, which is made for one module, register the format after executing it."""
        execute = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            execute(module)
            del loader.exec_module  # the instance's, which hides the class's
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(_REGISTERS)

        loader.exec_module = exec_module


def announce() -> None:
    """Registers the format now where transformers' models can be loaded already; else as soon as they can."""
    if _AFTER in sys.modules:
        import_module(_REGISTERS)
    else:
        sys.meta_path.insert(0, _Finder())
