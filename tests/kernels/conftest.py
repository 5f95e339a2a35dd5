"""Makes triton's interpreter several times faster."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _patch, _patched = interpreter._patch_lang, set()

    def _call(self, *args, **kwargs):
        """A call from kernel to function, which by default patches the language anew each time; a launch does, too."""
        languages = frozenset(
            name
            for name, value in self.fn.__globals__.items()
            if value is interpreter.tl or value is interpreter.tl.core
        )
        if languages != {"tl"} and languages not in _patched:
            _patched.add(languages)
            _patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
