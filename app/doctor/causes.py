"""Why a connection failed, and what to do about it: from what the transports and the store's library really raise.

Only types and codes of exceptions are read, and of a proxy's refusal the status: messages may quote a secret.
"""

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator
from typing import NamedTuple

import httpx

from app.config.settings import SettingsError
from app.config.surroundings import proxy_for

PROXY = "HTTPS_PROXY"
CERTIFICATES = "SSL_CERT_FILE"
AUTHORITIES = {18, 19, 20, 21}
"""OpenSSL's X509_V_ERR_…: signed by itself, or by an authority that is not known here."""
EXPIRED, NOT_YET_VALID = 10, 9
OTHER_NAME = {62, 64}
"""The certificate names another host (62) or another IP address (64)."""
NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL}
PROXY_REMEDIES = {
    403: "have the proxy allow this host, or list it in NO_PROXY",
    407: f"write the proxy's user and password into {PROXY}, as http://user:password@host:port",
}


class Cause(NamedTuple):
    """`reason`: follows a colon. `remedy`: what to do."""

    reason: str
    remedy: str


def cause_of(error: BaseException, *, setting: str, url: str = "") -> Cause | None:
    """Return why there is no connection; None if that cannot be told.

    `setting`: names the address. `url`: the address, if it may be reached through a proxy.
    """
    through_proxy = bool(url) and _has_proxy(url)
    for each in _chain(error):
        if cause := _explain(each, PROXY if through_proxy else setting, through_proxy):
            return cause
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it; libraries hide the first cause behind their own classes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _has_proxy(url: str) -> bool:
    try:
        return proxy_for(url) is not None
    except SettingsError:
        return True


def _explain(error: BaseException, setting: str, through_proxy: bool) -> Cause | None:
    its = f"the proxy in {PROXY}: " if through_proxy else ""
    match error:
        case ssl.SSLCertVerificationError():
            return _certificate(error.verify_code)
        case ssl.SSLError() if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
            return Cause("it does not speak TLS on that port", "correct the scheme or the port of the address")
        # SSLZeroReturnError is what older Pythons raise for SSLEOFError.
        case (
            ssl.SSLEOFError()
            | ssl.SSLZeroReturnError()
            | ConnectionResetError()
            | ConnectionAbortedError()
            | BrokenPipeError()
        ):
            remedy = f"check host and port in {setting}, and the firewall"
            return Cause(f"{its}it closed the connection at once", remedy)
        case ssl.SSLError():
            return Cause("the TLS handshake failed", "compare the TLS versions and certificates that it accepts")
        case socket.gaierror(errno=socket.EAI_AGAIN):
            return Cause(f"{its}no name server answers", "check this machine's DNS")
        case socket.gaierror() | UnicodeError():
            return Cause(f"{its}its name cannot be resolved", f"correct the host in {setting}, or this machine's DNS")
        case ConnectionRefusedError():
            return Cause(f"{its}nothing listens there", f"check that it runs, and host and port in {setting}")
        case httpx.ProxyError():
            return _proxy(error)
        case OSError(errno=code) if code in NO_ROUTE:
            return Cause(f"{its}no route to it", f"check this machine's network, and the host in {setting}")
        case httpx.ConnectTimeout() | OSError(errno=errno.ETIMEDOUT):
            return Cause(f"{its}no connection in time", f"check the firewall, and the host in {setting}")
    return None


def _certificate(code: int) -> Cause:
    if code == EXPIRED:
        return Cause("its certificate has expired", "have it renewed; check this machine's clock, too")
    if code == NOT_YET_VALID:
        return Cause("its certificate is not valid yet", "check this machine's clock")
    if code in OTHER_NAME:
        return Cause("its certificate is for another name", "write the address with the name that the certificate has")
    if code in AUTHORITIES:
        file = os.environ.get(CERTIFICATES)
        if file and not os.path.isfile(file):
            return Cause("its certificate is not trusted", f"{CERTIFICATES} names no file: correct it")
        remedy = (
            "add the authority that signed it to" if file else "if it is a company's own, or its proxy's, name it in"
        )
        return Cause("its certificate is not trusted", f"{remedy} {CERTIFICATES}")
    return Cause("its certificate is not valid", "have it replaced")


def _proxy(error: httpx.ProxyError) -> Cause:
    status = re.search(r"\b[1-5][0-9]{2}\b", str(error))
    reason = f"the proxy in {PROXY} " + (f"answered {status[0]}" if status else "closed the connection")
    remedy = PROXY_REMEDIES.get(int(status[0]) if status else 0, f"check {PROXY}, or list the host in NO_PROXY")
    return Cause(reason, remedy)
