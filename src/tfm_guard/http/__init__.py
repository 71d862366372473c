"""The guard over HTTP and WebSocket."""
