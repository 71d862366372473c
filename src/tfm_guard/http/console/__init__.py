"""Settings → API Keys: the page on which people manage the keys of their account."""
