"""Opens a page in headless Chromium, at several widths, in light and in dark, and says what a reader meets there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
WIDTHS = (400, 900, 1400)
MODES = ("light", "dark")

# Runs inside of each frame. Contrast is that of the text's colour and the nearest colour behind it (WCAG 2.1).
_LOOK = """
const wait = new Promise(done => addEventListener("load", done));
function channels(text) { return (text.match(/[\\d.]+/g) || []).map(Number); }
function light(rgb) {
  const part = rgb.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
}
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const found = channels(getComputedStyle(at).backgroundColor);
    if (found.length === 3 || (found.length === 4 && found[3] > 0)) return found;
  }
  return [255, 255, 255];
}
wait.then(async () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const texts = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.textContent.trim() || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    if (!element.getClientRects().length) continue;
    const svg = element.namespaceURI.endsWith("svg");
    const a = light(channels(svg ? style.fill : style.color)), b = light(behind(element));
    texts.push({
      text: node.textContent.trim().slice(0, 40), contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
      size: parseFloat(style.fontSize) * (svg ? element.getBoundingClientRect().height / element.getBBox().height : 1),
      chart: svg, right: element.getBoundingClientRect().right, left: element.getBoundingClientRect().left,
    });
  }
  const images = [...document.querySelectorAll("img")].map(image => ({
    width: image.getBoundingClientRect().width, group: image.closest(".mosaic") ? "mosaic" : "other" }));
  const found = { texts, images, width: innerWidth, content: document.documentElement.scrollWidth, violations: null };
  if (window.axe) {
    const said = await axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"] });
    found.violations = said.violations.map(v => `${v.id}: ${v.nodes[0].html.slice(0, 160)}`);
  }
  parent.postMessage({ place: name, found }, "*");
});
"""
_OUTER = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>%s<script>
const found = {}, wanted = %d;
addEventListener("message", event => {
  found[event.data.place] = event.data.found;
  if (Object.keys(found).length === wanted)
    document.getElementById("found").textContent = encodeURIComponent(JSON.stringify(found));
});
</script>"""


def in_mode(page: str, mode: str) -> str:
    """A page as it is in light or dark, whatever the system prefers."""
    return page.replace("(prefers-color-scheme: dark)", "all" if mode == "dark" else "not all")


def look(page: str, folder: Path, axe: Path | None = None) -> dict[tuple[str, int], dict]:
    """What stands in a page, by mode and width: its texts with contrast and size, pictures, and axe's violations."""
    script = "" if axe is None else f"<script>{axe.read_text('utf-8')}</script>"
    frames = []
    for mode in MODES:
        inner = folder / f"{mode}.html"
        shown = in_mode(page, mode).replace("</body>", f"{script}<script>{_LOOK}</script></body>")
        inner.write_text(shown, "utf-8")
        frames += [
            f'<iframe name="{mode} {width}" src="{inner.name}" width="{width}" height="900" '
            'style="border: 0; position: absolute; left: 0; top: 0"></iframe>'
            for width in WIDTHS
        ]
    (folder / "outer.html").write_text(_OUTER % ("".join(frames), len(frames)), "utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000", "--dump-dom"),
        (folder / "outer.html").as_uri(),
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    held = re.search(r'<pre id="found">([^<]+)</pre>', said)
    assert held, f"the page said nothing: {said[-400:]}"
    found = json.loads(unquote(held[1]))
    return {(mode, width): found[f"{mode} {width}"] for mode in MODES for width in WIDTHS}


def find_axe(folder: Path) -> Path | None:
    """axe-core as npm brings it; None where there is no Node, or nothing is reached."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    quick = ["--fetch-retries=0", "--fetch-timeout=15000", "--prefer-offline"]
    command = [
        "npm",
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        *quick,
        "--prefix",
        str(folder),
        "axe-core@4",
    ]
    try:
        subprocess.run(command, capture_output=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    path = folder / "node_modules" / "axe-core" / "axe.min.js"
    return path if path.is_file() else None
