"""The guard: other hosts and other sites are refused, the studio's own page is not."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lora_studio.ui import guard


@pytest.fixture(scope="module")
def client():
    routes = [Route("/", lambda request: PlainTextResponse("hello"), methods=["GET", "POST"])]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(guard.SameOrigin)]), base_url="http://127.0.0.1:7860")


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860", "LOCALHOST:1"])
def test_own_names_are_served(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.com", "evil.com:7860", "127.0.0.1.evil.com", "localhost.evil.com", "", "[::1", "10.0.0.1:7860", "127.0.0.1@evil.com"])
def test_other_names_are_refused_whatever_the_method(client, host):
    for method in ("GET", "POST"):
        answer = client.request(method, "/", headers={"host": host})
        assert answer.status_code == 403 and answer.text == guard.REFUSAL


@pytest.mark.parametrize("headers", [{}, {"origin": "http://127.0.0.1:7860"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}])
def test_own_posts_are_served(client, headers):
    assert client.post("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.com"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"}, {"origin": "http://localhost:7860"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}],
)
def test_posts_of_other_sites_are_refused(client, headers):
    assert client.post("/", headers=headers).status_code == 403
    assert client.get("/", headers=headers).status_code == 200
