"""The whole broker in virtual time: replicas, a shared store, OneInbox, browsers and crashes, all from one seed."""
