"""What a server needs beside the engine: the parts of answers, and what goes over HTTP."""
