"""Many answers at a time: requests come and go, and share the steps of one model."""
