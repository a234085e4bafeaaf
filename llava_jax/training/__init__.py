"""One stage of training: what trains at which rate, on what data, kept where."""
