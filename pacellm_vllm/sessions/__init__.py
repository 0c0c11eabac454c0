"""Sessions: text of earlier requests, read again where a later one asks about it (docs/recall.md).

All of it is on the front end's side: what is read again becomes part of the request's prompt before
the request is scheduled.
"""
