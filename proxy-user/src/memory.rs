//! The agent's own memory.

/// Gives back to the system what was freed. glibc keeps it, and what it takes to load the programs and to take in
/// the first lists is several times what is kept.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it looks at nothing but the allocator's own state, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
