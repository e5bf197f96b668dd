"""A real Chromium without a screen; its camera shows a file. For tests of pages, and for page.py."""

import shutil
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"),
]


def write_video(path, pixels):
    """Write an image [H, W, 3] as a video of equal frames, in the format that Chromium's fake camera reads."""
    import numpy as np

    height, width = pixels.shape[:2]
    values = pixels.astype(float)
    luma = 16 + values @ [0.257, 0.504, 0.098]
    blue, red = 128 + values @ [-0.148, -0.291, 0.439], 128 + values @ [0.439, -0.368, -0.071]
    halved = [plane.reshape(height // 2, 2, width // 2, 2).mean((1, 3)) for plane in (blue, red)]
    frame = b"FRAME\n" + b"".join(np.uint8(plane.round()).tobytes() for plane in (luma, *halved))
    path.write_bytes(f"YUV4MPEG2 W{width} H{height} F30:1 Ip A1:1 C420mpeg2\n".encode() + 3 * frame)
    return path


@contextmanager
def opened_browser(video=None, width=1280):
    """Yield a browser's context and the list of what its pages said on their consoles. With a video the camera is allowed."""
    from playwright.sync_api import sync_playwright

    allowed = ["--use-fake-ui-for-media-stream", f"--use-file-for-fake-video-capture={video}"] if video else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *allowed])
        context = browser.new_context(viewport={"width": width, "height": 800})
        context.set_default_timeout(60_000)
        said = []

        def hear(message):
            if message.text != "No available adapters.":  # Chromium's own remark where there is no GPU
                said.append(f"{message.type}: {message.text}")

        context.on("console", hear)
        context.on("weberror", lambda error: said.append(str(error.error)))
        yield context, said
        browser.close()
