"""How people judge a merge: before it is made, once it is served, and in search of a better one."""
