"""Where drivers live: each module turns one outside thing into a port, and its errors into ours."""
