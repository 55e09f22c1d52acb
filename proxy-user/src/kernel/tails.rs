//! The programs of stories, which the hooks call: one table of them for each set of programs.
//!
//! A table is never changed under programs that use it: a new set has a table of its own, and goes into the
//! links with it. The kernel empties a table that nobody holds, so it is pinned; the pins of earlier
//! ones go when no link uses their programs any more.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use aya::Ebpf;
use aya::maps::{Map, MapData, ProgramArray};
use aya::programs::SchedClassifier;

use super::load::shortened;
use super::sys;

/// The stories' programs, in the order of `datapath::Story`, without the family.
const STORIES: [&str; 10] =
    ["pod", "out", "reply", "pending", "arrive", "leave", "settle", "send", "refuse", "icmp"];
/// How the pins of tables begin.
const PIN: &str = "tails-";

/// The table of the programs that are loaded.
pub struct Tails {
    table: ProgramArray<MapData>,
    folder: PathBuf,
    pin: String,
    has_tunnels: bool,
}

/// Whether a program is for links without Ethernet headers: few nodes have such, so these are loaded
/// when the first one comes.
pub fn is_of_tunnels(program: &str) -> bool {
    program.starts_with("portal_l3")
}

impl Tails {
    /// Fills the table of programs that have just been loaded, and pins it in `folder`.
    pub fn install(ebpf: &mut Ebpf, folder: &Path) -> Result<Self> {
        let map = ebpf.take_map("tails").context("the object has no map tails")?;
        let Map::ProgramArray(data) = &map else { bail!("the map tails is of another kind") };
        let pin = format!("{PIN}{}", data.info()?.id());
        let path = folder.join(&pin);
        sys::pin(data.fd(), &path).with_context(|| format!("cannot pin {}", path.display()))?;
        let mut table = ProgramArray::try_from(map)?;
        fill(ebpf, &mut table, false)?;
        Ok(Self { table, folder: folder.to_owned(), pin, has_tunnels: false })
    }

    /// Adds the programs for links without Ethernet headers.
    pub fn add_tunnels(&mut self, ebpf: &mut Ebpf) -> Result<()> {
        if !self.has_tunnels {
            fill(ebpf, &mut self.table, true)?;
            self.has_tunnels = true;
        }
        Ok(())
    }

    /// Lets go of the tables of earlier programs, which no link has any more.
    pub fn remove_others(&self) {
        for name in pins(&self.folder).filter(|name| *name != self.pin) {
            if let Err(error) = fs::remove_file(self.folder.join(&name)) {
                tracing::warn!("cannot remove the pin {name}: {error}");
            }
        }
    }

    /// Lets go of this table, whose programs no link has.
    pub fn remove(self) {
        let _ = fs::remove_file(self.folder.join(&self.pin));
    }
}

fn pins(folder: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with(PIN))
}

/// Puts the programs for links with Ethernet headers, or for those without, into the table.
fn fill(ebpf: &mut Ebpf, table: &mut ProgramArray<MapData>, of_tunnels: bool) -> Result<()> {
    for (story, name) in (0..).zip(STORIES) {
        for (family, suffix) in [(0, "4"), (1, "6")] {
            let prefix = if of_tunnels { "l3" } else { "" };
            let name = format!("portal_{prefix}{name}{suffix}");
            // No pod's link is without.
            let Some(program) = ebpf.program_mut(&name) else { continue };
            let program: &mut SchedClassifier = program.try_into()?;
            if program.fd().is_err() {
                program.load().map_err(shortened).with_context(|| format!("program {name}"))?;
            }
            let index = story * 4 + family * 2 + u32::from(of_tunnels);
            table.set(index, program.fd()?, 0).with_context(|| format!("cannot call {name}"))?;
        }
    }
    Ok(())
}
