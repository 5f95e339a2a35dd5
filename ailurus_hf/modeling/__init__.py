"""Models, and the operations under them. This folder travels to the Hub, see `ailurus_hf.hub.save_with_code`."""

import os

if os.environ.get("AILURUS_KERNELS") == "1":  # this file does not travel
    from ..kernels import enable

    enable()
