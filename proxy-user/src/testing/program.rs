//! A loaded program's instructions, as the verifier has left them. bpftool, which shows them too, takes
//! seconds for each program where there is no hardware to help a virtual machine.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// The start of the kernel's `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    length: u32,
    jited: u64,
    instructions: u64,
}

/// The attributes of `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct Attributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// One instruction (RFC 9669, section 3).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Instruction {
    opcode: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    const fn destination(self) -> u8 {
        self.registers & 0xf
    }

    const fn source(self) -> u8 {
        self.registers >> 4
    }
}

fn ask(program: &impl AsFd, info: &mut Info) -> io::Result<()> {
    let fd = u32::try_from(program.as_fd().as_raw_fd()).expect("an open descriptor");
    let length = u32::try_from(size_of::<Info>()).expect("it is small");
    let mut attributes = Attributes { fd, length, info: std::ptr::from_mut(info) as u64 };
    let size = size_of::<Attributes>();
    // SAFETY: both structs are live and begin as the kernel's do; it writes no further than the lengths that they
    // name.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw mut attributes, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn instructions(program: &impl AsFd) -> io::Result<Vec<Instruction>> {
    let mut info = Info::default();
    ask(program, &mut info)?;
    let count = info.length as usize / size_of::<Instruction>();
    let mut instructions = vec![Instruction::default(); count];
    info = Info {
        length: info.length,
        instructions: instructions.as_mut_ptr() as u64,
        ..Info::default()
    };
    ask(program, &mut info)?;
    Ok(instructions)
}

/// How many bytes of the stack a loaded program uses: as far down as its instructions reach from the frame
/// pointer.
///
/// # Errors
/// If the kernel does not show them.
///
/// # Panics
/// If it calls a function of its own, which has a frame of its own.
pub fn stack_of(program: &impl AsFd) -> io::Result<u32> {
    const FRAME: u8 = 10;
    const CALL: u8 = 0x85;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let mut deepest = 0;
    let mut copy = None;
    for instruction in instructions(program)? {
        let Instruction { opcode, offset, immediate, .. } = instruction;
        let (to, from) = (instruction.destination(), instruction.source());
        assert!(opcode != CALL || from != 1, "a function of its own");
        let reaches = match opcode & 7 {
            1 if from == FRAME => -i32::from(offset),
            2 | 3 if to == FRAME => -i32::from(offset),
            _ if opcode == ADD && copy == Some(to) => -immediate,
            _ => 0,
        };
        deepest = deepest.max(reaches);
        copy = (opcode == MOVE && from == FRAME).then_some(to);
    }
    Ok(deepest.unsigned_abs())
}
