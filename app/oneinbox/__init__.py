"""The upstream API: the only place that knows OneInbox's URLs and shapes, and the only holder of its key."""

from app.oneinbox.client import OneInbox
from app.oneinbox.models import CallRecord, WebCall

__all__ = ["CallRecord", "OneInbox", "WebCall"]
