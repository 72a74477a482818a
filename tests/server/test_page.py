"""The files of the chat page: who may have them, with which headers, and what they leave alone."""

import re

import httpx2 as httpx
import pytest
from tests.server.conftest import on_a_socket, user

from gemsmith.server.page import FILES, HEADERS

OURS = sorted(p for p in FILES.iterdir() if p.suffix in (".js", ".css", ".html", ".svg"))
SCRIPTS = [path for path in OURS if path.suffix == ".js"]


@pytest.fixture(scope="module")
def site(tiny):
    """A client without a key of a server that asks for one."""
    with (
        on_a_socket(tiny, keys=("a-secret-key",)) as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        yield client


def test_the_page_needs_no_key_and_all_it_refers_to_is_there(site):
    page = site.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
    assert len(named) == 6
    for path in FILES.rglob("*.js"):
        folder = path.parent.relative_to(FILES.parent)
        for name in re.findall(r'^import .* from "\./([^"]+)";$', path.read_text(), re.M):
            named.append(f"{folder}/{name}")
    kinds = {"css": "text/css", "js": "javascript", "svg": "image/svg+xml"}
    for name in set(named):
        found = site.get(f"/{name}")
        assert found.status_code == 200, name
        assert kinds[name.rpartition(".")[2]] in found.headers["content-type"]


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/base.css", "/page/icon.svg"])
def test_every_file_comes_with_the_headers_that_lock_the_page_in(site, path):
    found = site.get(path)
    assert found.headers.items() >= HEADERS.items()
    policy = found.headers["content-security-policy"]
    assert "default-src 'self';" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_a_file_that_has_not_changed_is_not_sent_again(site):
    tag = site.get("/page/main.js").headers["etag"]
    assert site.get("/page/main.js", headers={"if-none-match": tag}).status_code == 304


def test_the_key_is_asked_for_beside_the_page(site):
    assert site.get("/v1/models").status_code == 401
    for path in ("/page/../v1/models", "/page/%2e%2e/v1/models", "/page/..%2fapp.py", "/page/"):
        assert site.get(path).status_code in (401, 404), path
    assert site.post("/page/main.js").status_code == 405
    body = {"model": "gemma", "messages": user("hi")}
    assert site.post("/", json=body).status_code == 405


def test_the_model_tells_what_it_reads_and_the_server_what_it_holds(site, tiny):
    key = {"authorization": "Bearer a-secret-key"}
    [model] = site.get("/v1/models", headers=key).json()["data"]
    assert model["modalities"] == ["text"]
    text = site.get("/metrics", headers=key).text
    held = re.findall(r'^gemsmith:weights_bytes{model_name="gemma"} (\S+)$', text, re.M)
    assert [float(each) for each in held] == [tiny.memory()["weights"]]
    assert re.search(r"^process_resident_memory_bytes \d", text, re.M)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_of_the_page_comes_from_elsewhere_or_runs_inline(path):
    text = path.read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text)
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=\"|\sstyle=", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_parses_text_as_html_or_runs_it(path):
    sinks = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser",
             "createContextualFragment", "setHTML", "eval(", "new Function")  # fmt: skip
    assert [sink for sink in sinks if sink in path.read_text("utf-8")] == []


def test_the_page_is_small_and_its_library_is_the_one_that_is_named():
    files = [path for path in FILES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000
    library = (FILES / "vendor" / "marked.esm.js").read_text("utf-8")
    notes = (FILES / "vendor" / "README.md").read_text("utf-8")
    [version] = re.findall(r"^ \* marked v(\S+) - ", library, re.M)
    assert f"# marked {version}\n" in notes
    assert "MIT" in (FILES / "vendor" / "marked.LICENSE").read_text("utf-8")
