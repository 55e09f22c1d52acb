//! The few bpf(2) commands that aya 0.14 does not offer: links by interface index, link updates for
//! all kinds, and batched look-ups (docs/decisions/0004).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Puts a link before all others on its hook.
const BPF_F_BEFORE: u32 = 1 << 3;
/// The number of XDP (`enum bpf_attach_type`).
const XDP: u32 = 37;
/// In the kernel's general code (`XDP_FLAGS_SKB_MODE`).
const XDP_GENERIC: u32 = 1 << 1;
/// In the driver (`XDP_FLAGS_DRV_MODE`).
const XDP_DRIVER: u32 = 1 << 2;
/// Puts it behind them.
const BPF_F_AFTER: u32 = 1 << 4;
/// The number of tcx ingress (`enum bpf_attach_type`).
pub const TCX_INGRESS: u32 = 46;
/// The number of tcx egress.
pub const TCX_EGRESS: u32 = 47;

/// Runs a bpf(2) command whose attributes are `attributes`.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    let size = u32::try_from(size_of::<T>()).expect("attributes are small");
    // SAFETY: the pointer and the size are those of a live struct of the command's layout; the kernel
    // reads no further and refuses what it does not know.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: libc::c_long) -> OwnedFd {
    let fd = RawFd::try_from(result).expect("a descriptor is a small number");
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[repr(C)]
struct ObjAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Opens a pinned object.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes = ObjAttributes { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    bpf(BPF_OBJ_GET, &mut attributes).map(owned)
}

/// Pins an object.
pub fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let fd = raw(&object);
    let mut attributes = ObjAttributes { path: path.as_ptr() as u64, fd, flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attributes).map(drop)
}

fn raw(object: &impl AsFd) -> u32 {
    u32::try_from(object.as_fd().as_raw_fd()).expect("an open descriptor is not negative")
}

/// Where among others on its hook a program is put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Before them.
    First,
    /// Behind them.
    Last,
}

/// By whose code packets get to an XDP program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    /// The driver's.
    Native,
    /// The kernel's general one.
    Generic,
}

/// Where a program is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttachPoint {
    /// tcx of a network link.
    Tcx {
        /// The link.
        ifindex: u32,
        /// 46 for ingress, 47 for egress.
        attach_type: u32,
        /// Before or behind the others that are there now.
        order: Order,
    },
    /// XDP of a network link.
    Xdp {
        /// The link.
        ifindex: u32,
        /// By whose code.
        manner: Manner,
    },
    /// A cgroup.
    Cgroup {
        /// The cgroup's directory, open.
        directory: RawFd,
        /// The cgroup's id, which is its inode number.
        id: u64,
        /// The hook.
        attach_type: u32,
    },
}

#[repr(C)]
struct LinkCreateAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    revision: u64,
}

/// Attaches a program by a link, which holds as long as the descriptor or a pin of it lives.
pub fn link_create(program: impl AsFd, at: AttachPoint) -> io::Result<OwnedFd> {
    let (target, attach_type, flags) = match at {
        AttachPoint::Tcx { ifindex, attach_type, order: Order::First } => {
            (ifindex, attach_type, BPF_F_BEFORE)
        }
        AttachPoint::Tcx { ifindex, attach_type, order: Order::Last } => {
            (ifindex, attach_type, BPF_F_AFTER)
        }
        AttachPoint::Xdp { ifindex, manner: Manner::Native } => (ifindex, XDP, XDP_DRIVER),
        AttachPoint::Xdp { ifindex, manner: Manner::Generic } => (ifindex, XDP, XDP_GENERIC),
        AttachPoint::Cgroup { directory, attach_type, .. } => {
            (u32::try_from(directory).map_err(io::Error::other)?, attach_type, 0)
        }
    };
    let program = raw(&program);
    let mut attributes = LinkCreateAttributes {
        program,
        target,
        attach_type,
        flags,
        relative: 0,
        pad: 0,
        revision: 0,
    };
    bpf(BPF_LINK_CREATE, &mut attributes).map(owned)
}

#[repr(C)]
struct LinkUpdateAttributes {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Replaces a link's program, between one packet and the next. ENOLINK if what it was attached to is
/// gone.
pub fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let (link, program) = (raw(&link), raw(&program));
    let mut attributes = LinkUpdateAttributes { link, program, flags: 0, old_program: 0 };
    bpf(BPF_LINK_UPDATE, &mut attributes).map(drop)
}

/// Takes a link's program off its hook (kernel 5.9). Without this a link holds until the last descriptor of it is closed,
/// and a little longer.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    let mut link = raw(&link);
    bpf(BPF_LINK_DETACH, &mut link).map(drop)
}

#[repr(C)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// The head of `struct bpf_link_info`; what a link is attached to comes first in its union.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    target: u64,
    rest: [u64; 8],
}

/// Has the kernel fill in what it tells of an object.
fn inform<T>(object: impl AsFd, info: &mut T) -> io::Result<()> {
    let length = u32::try_from(size_of::<T>()).expect("it is small");
    let info = std::ptr::from_mut(info) as u64;
    let mut attributes = InfoAttributes { fd: raw(&object), length, info };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes).map(drop)
}

/// The number of the program that a link has.
pub fn program_of(link: impl AsFd) -> io::Result<u32> {
    let mut info = LinkInfo::default();
    inform(link, &mut info)?;
    Ok(info.program)
}

/// Whether a link is attached to `at`, in whichever order.
pub fn link_is_at(link: impl AsFd, at: AttachPoint) -> io::Result<bool> {
    let mut info = LinkInfo::default();
    inform(link, &mut info)?;
    Ok(match at {
        // The upper half is the attach type.
        AttachPoint::Tcx { ifindex, .. } | AttachPoint::Xdp { ifindex, .. } => {
            info.target & 0xffff_ffff == u64::from(ifindex)
        }
        AttachPoint::Cgroup { id, .. } => info.target == id,
    })
}

#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    target: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
    more: [u64; 4],
}

/// The numbers of the programs at a link's tcx hook, in their order (kernel 6.6).
pub fn chain(ifindex: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    /// As many as a hook can have.
    const MOST: u32 = 64;
    let mut programs = vec![0_u32; MOST as usize];
    let mut attributes = QueryAttributes {
        target: ifindex,
        attach_type,
        programs: programs.as_mut_ptr() as u64,
        count: MOST,
        ..QueryAttributes::default()
    };
    bpf(BPF_PROG_QUERY, &mut attributes)?;
    programs.truncate(attributes.count as usize);
    Ok(programs)
}

#[repr(C)]
#[derive(Default)]
struct ByIdAttributes {
    id: u32,
    next: u32,
    flags: u32,
}

/// Opens a loaded program by its number.
pub fn program(id: u32) -> io::Result<OwnedFd> {
    bpf(BPF_PROG_GET_FD_BY_ID, &mut ByIdAttributes { id, ..Default::default() }).map(owned)
}

/// The head of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    length: u32,
    jited: u64,
    instructions: u64,
}

/// A loaded program's instructions, as the verifier has left them; zeros if the kernel does not show them.
pub fn instructions(program: impl AsFd) -> io::Result<Vec<Instruction>> {
    let mut info = ProgramInfo::default();
    inform(&program, &mut info)?;
    let length = info.length;
    let mut instructions = vec![Instruction::default(); length as usize / size_of::<Instruction>()];
    let place = instructions.as_mut_ptr() as u64;
    inform(&program, &mut ProgramInfo { length, instructions: place, ..ProgramInfo::default() })?;
    Ok(instructions)
}

#[repr(C)]
struct BatchAttributes {
    in_token: u64,
    out_token: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    flags: u64,
    more_flags: u64,
}

/// Elements read in one go, and in one go at most: as many as a bucket of the hash may have.
const BATCH: u32 = 1024;
const LARGEST_BATCH: u32 = 65_536;

/// Reads a hash map in batches (kernel 5.6) and hands each element to `each`. Elements that are
/// inserted or removed meanwhile may or may not be among them.
pub fn for_each<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: impl AsFd,
    mut each: impl FnMut(&K, &V),
) -> io::Result<()> {
    let mut size = BATCH;
    let mut keys: Vec<K> = vec![K::zeroed(); size as usize];
    let mut values: Vec<V> = vec![V::zeroed(); size as usize];
    let (mut token, mut next) = (0_u32, 0_u32);
    let mut first = true;
    loop {
        let mut attributes = BatchAttributes {
            in_token: if first { 0 } else { (&raw const token) as u64 },
            out_token: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: size,
            map: raw(&map),
            flags: 0,
            more_flags: 0,
        };
        let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes);
        let end = match result {
            Ok(_) => false,
            // The last batch, which counts all the same.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && size < LARGEST_BATCH => {
                size *= 2;
                keys.resize(size as usize, K::zeroed());
                values.resize(size as usize, V::zeroed());
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = attributes.count as usize;
        keys[..count].iter().zip(&values[..count]).for_each(|(key, value)| each(key, value));
        if end {
            return Ok(());
        }
        (token, first) = (next, false);
    }
}

#[repr(C)]
struct ElementAttributes {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Takes an element out of a hash map: what was there when it went. `None` if there is none. Before Linux
/// 5.14 the kernel refuses with EINVAL or ENOTSUPP.
pub fn take<K: bytemuck::Pod, V: bytemuck::Pod>(map: impl AsFd, key: &K) -> io::Result<Option<V>> {
    let mut value = V::zeroed();
    let mut attributes = ElementAttributes {
        map: raw(&map),
        pad: 0,
        key: std::ptr::from_ref(key) as u64,
        value: (&raw mut value) as u64,
        flags: 0,
    };
    match bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attributes) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One instruction of a program (RFC 9669, section 3): its code, its registers, and a number.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// Where to, in the lower half, and where from.
    pub registers: u8,
    /// An offset.
    pub offset: i16,
    /// A number.
    pub immediate: i32,
}

impl Instruction {
    /// The register that it writes.
    pub const fn destination(self) -> u8 {
        self.registers & 0xf
    }

    /// The register that it reads.
    pub const fn source(self) -> u8 {
        self.registers >> 4
    }
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct RunAttributes {
    program: u32,
    result: u32,
    length_in: u32,
    length_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// The kind of tc's programs (`enum bpf_prog_type`).
pub const CLASSIFIER: u32 = 3;

/// Loads a small program of a kind.
pub fn load(kind: u32, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let mut attributes = LoadAttributes {
        kind,
        count,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        ..LoadAttributes::default()
    };
    bpf(BPF_PROG_LOAD, &mut attributes).map(owned)
}

/// A small tc program.
pub struct Classifier(OwnedFd);

impl Classifier {
    /// Loads it.
    pub fn load(instructions: &[Instruction]) -> io::Result<Self> {
        load(CLASSIFIER, instructions).map(Self)
    }

    /// Runs it once on a packet of zeros, and returns what it returns.
    pub fn run(&self) -> io::Result<u32> {
        let packet = [0_u8; 64];
        let mut run = RunAttributes {
            program: raw(&self.0),
            length_in: u32::try_from(packet.len()).expect("it is short"),
            data_in: packet.as_ptr() as u64,
            repeat: 1,
            ..RunAttributes::default()
        };
        bpf(BPF_PROG_TEST_RUN, &mut run)?;
        Ok(run.result)
    }
}
