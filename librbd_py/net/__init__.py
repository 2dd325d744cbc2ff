"""Talking to web servers and object stores: HTTP(S) with kept connections, retries and deadlines; S3 on top."""
