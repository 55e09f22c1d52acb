//! Programs of someone else at the same hooks of a link.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use super::namespace::Namespace;
pub use crate::kernel::sys::Order;
use crate::kernel::sys::{self, AttachPoint, Instruction, Manner};

/// What the program of a neighbour does with what leaves by the link.
#[derive(Clone, Copy, Debug)]
pub enum Conduct {
    /// It drops what comes from an address and port, as one does that keeps a table of connections and does not
    /// know this one. The rest is the next program's.
    Drops(SocketAddr),
    /// It takes everything for good: no other program sees it.
    Ends,
}

/// A program at a hook of a link, as long as this lives.
pub struct Neighbour(OwnedFd);

impl Neighbour {
    /// Attaches the program to a link of the namespace.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn join(namespace: &Namespace, link: &str, conduct: Conduct, order: Order) -> Self {
        let instructions = match conduct {
            Conduct::Drops(from) => drops(from),
            Conduct::Ends => vec![verdict(PASS), EXIT],
        };
        Self::attach(namespace, link, (sys::CLASSIFIER, &instructions), |ifindex| {
            AttachPoint::Tcx { ifindex, attach_type: sys::TCX_EGRESS, order }
        })
    }

    /// Attaches programs that leave everything to the next one, to both hooks of a link.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn idle(namespace: &Namespace, link: &str) -> [Self; 2] {
        [sys::TCX_INGRESS, sys::TCX_EGRESS].map(|attach_type| {
            Self::attach(namespace, link, (sys::CLASSIFIER, &[verdict(NEXT), EXIT]), |ifindex| {
                AttachPoint::Tcx { ifindex, attach_type, order: Order::Last }
            })
        })
    }

    /// Attaches a program to XDP of a link that lets everything pass.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn at_xdp(namespace: &Namespace, link: &str) -> Self {
        Self::attach(namespace, link, (XDP, &[verdict(XDP_PASS), EXIT]), |ifindex| {
            AttachPoint::Xdp { ifindex, manner: Manner::Native }
        })
    }

    fn attach(
        namespace: &Namespace,
        link: &str,
        (kind, instructions): (u32, &[Instruction]),
        at: impl FnOnce(u32) -> AttachPoint + Send,
    ) -> Self {
        let attach = || {
            let ifindex = nix::net::if_::if_nametoindex(link).expect("there is such a link");
            let program = sys::load(kind, instructions).expect("cannot load a neighbour");
            sys::link_create(program, at(ifindex)).expect("cannot attach a neighbour")
        };
        Self(namespace.run(attach))
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // Closing a link takes its program off only a moment later.
        let _ = sys::link_detach(&self.0);
    }
}

const NEXT: i32 = -1;
const PASS: i32 = 0;
const SHOT: i32 = 2;
/// The kind of programs (`enum bpf_prog_type`).
const XDP: u32 = 6;
const XDP_PASS: i32 = 2;
const EXIT: Instruction = instruction(0x95, 0, 0, 0);
/// Where the packet begins and ends (`struct __sk_buff`).
const DATA: i16 = 76;
const DATA_END: i16 = 80;

const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers, offset, immediate }
}

const fn verdict(verdict: i32) -> Instruction {
    instruction(0xb7, 0, 0, verdict)
}

/// Loads so much of the packet, and leaves out the next instructions unless it has a value.
fn unless(size: u8, at: i16, value: u32, skip: i16) -> [Instruction; 2] {
    let load = instruction(size, 0x25, at, 0);
    // In all 32 bits.
    [load, instruction(0x56, 0x05, skip, value.cast_signed())]
}

fn drops(from: SocketAddr) -> Vec<Instruction> {
    const WORD: u8 = 0x61;
    const HALF: u8 = 0x69;
    let (kind, address_at, port_at, octets) = match from.ip() {
        IpAddr::V4(ip) => (0x0800_u16, 26, 34, ip.octets()),
        // The last four tell enough.
        IpAddr::V6(ip) => (0x86dd, 34, 54, *ip.octets().last_chunk().expect("it has more")),
    };
    let mut program = vec![
        instruction(WORD, 0x12, DATA, 0),
        instruction(WORD, 0x13, DATA_END, 0),
        instruction(0xbf, 0x24, 0, 0),
        instruction(0x07, 0x04, 0, i32::from(port_at) + 2),
        // Too short.
        instruction(0x2d, 0x34, 8, 0),
    ];
    program.extend(unless(HALF, 12, kind.to_be().into(), 6));
    program.extend(unless(WORD, address_at, u32::from_ne_bytes(octets), 4));
    program.extend(unless(HALF, port_at, from.port().to_be().into(), 2));
    program.extend([verdict(SHOT), EXIT, verdict(NEXT), EXIT]);
    program
}
