"""What every HTTP server needs: connections, bodies, errors, CORS, event streams, access log."""
