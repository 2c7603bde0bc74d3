# From the PVH entry (32-bit protected mode, paging off, EBX = start info) to ring 3, and back into
# ring 0 for interrupts and for the few instructions that need it. Only instructions that a
# software KVM emulates in ring 0 are used here: no int n, no sysret, no SSE.

.section .note.Xen, "a", @note
    .long 4, 4, 18                  # name size, description size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_start

.section .text.boot, "ax"
.code32
.globl pvh_start
pvh_start:
    lgdt [gdt_pointer]
    mov eax, cr4
    or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER: LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb             # EM off
    or eax, 0x80000003              # PG, MP, PE
    mov cr0, eax
    .byte 0xea                      # ljmp 0x10:start64
    .long start64
    .word 0x10
.code64
start64:
    mov r13d, ebx
    lea rsp, [rip + kernel_stack_top]
    mov ax, 0x18
    mov ds, ax
    mov es, ax
    mov ss, ax
    call load_tables
    # ring 3, interrupts on
    mov edi, r13d
    push 0x2b
    lea rax, [rip + user_stack_top]
    sub rax, 8
    push rax
    push 0x202
    push 0x33
    lea rax, [rip + guest_main]
    push rax
    iretq

# TSS (all ports open to ring 3: IOPL does not survive a software KVM), IDT, LAPIC
load_tables:
    lea rax, [rip + tss]
    lea rcx, [rip + kernel_stack_top]
    mov [rax + 4], rcx
    mov word ptr [rax + 102], 104
    mov byte ptr [rax + 8296], 0xff
    lea rbx, [rip + gdt + 0x40]
    mov word ptr [rbx], 0x2068
    mov [rbx + 2], ax
    shr rax, 16
    mov [rbx + 4], al
    mov byte ptr [rbx + 5], 0x89
    mov byte ptr [rbx + 6], 0
    mov [rbx + 7], ah
    shr rax, 16
    mov [rbx + 8], eax
    mov dword ptr [rbx + 12], 0
    mov ax, 0x40
    ltr ax
    lea rsi, [rip + stubs]
    lea rdi, [rip + idt]
    xor ecx, ecx
1:  mov [rdi], si
    mov word ptr [rdi + 2], 0x10
    mov word ptr [rdi + 4], 0xee00
    mov rax, rsi
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], eax
    mov dword ptr [rdi + 12], 0
    add rsi, 16
    add rdi, 16
    inc ecx
    cmp ecx, 256
    jne 1b
    lidt [rip + idt_pointer]
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff
    ret

# A service of ring 0, asked for by int3. rax: 1 = cpuid of leaf edi, subleaf esi, result to [rdx];
# 2 = wait for an interrupt; 3 = rdmsr of edi to rax; 4 = wrmsr of rsi to edi. (Not by syscall: a software KVM runs that handler with ring 3's rights.)
service:
    add rsp, 8
    cmp eax, 1
    jne 2f
    push rbx
    mov r9, rdx
    mov eax, edi
    mov ecx, esi
    cpuid
    mov [r9], eax
    mov [r9 + 4], ebx
    mov [r9 + 8], ecx
    mov [r9 + 12], edx
    pop rbx
    iretq
2:  cmp eax, 3
    jae 3f
    sti
    hlt
    cli
    iretq
3:  mov ecx, edi
    jne 4f
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq
4:  mov rax, rsi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    iretq

# Every vector pushes its number. From 0x40 on it is an interrupt: count it, end it.
entry:
    cmp dword ptr [rsp], 3
    je service
    cmp dword ptr [rsp], 0x40
    jb 3f
    push rax
    push rbx
    mov eax, [rsp + 16]
    lea rbx, [rip + INTERRUPTS]
    lock inc qword ptr [rbx + rax * 8]
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xb0], 0
    pop rbx
    pop rax
    add rsp, 8
    iretq
# An exception: its number and the words above it go to the serial port, then a triple fault.
3:  mov dx, 0x3f8
    lea rsi, [rip + exception_text]
4:  mov al, [rsi]
    test al, al
    jz 5f
    out dx, al
    inc rsi
    jmp 4b
5:  mov ecx, 4
6:  mov rax, [rsp]
    add rsp, 8
    mov ebx, 16
7:  rol rax, 4
    mov r8, rax
    and eax, 15
    cmp al, 10
    jb 8f
    add al, 39
8:  add al, 48
    out dx, al
    mov rax, r8
    dec ebx
    jnz 7b
    mov al, 32
    out dx, al
    dec ecx
    jnz 6b
    mov al, 10
    out dx, al
    lidt [rip + null_pointer]
    ud2

.balign 16
stubs:
.set vector, 0
.rept 256
    .balign 16
    .byte 0x68
    .long vector
    jmp entry
    .set vector, vector + 1
.endr

# Application processors start here in real mode; `processors` copies the code to 0x8000.
.globl trampoline_start
.globl trampoline_end
trampoline_start:
.code16
    cli
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16    # lgdt [0x8000 + offset]
    .word 0x8000 + trampoline_gdt - trampoline_start
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb             # caches on, EM off
    or eax, 0x80000003
    mov cr0, eax
    .byte 0x66, 0xea                # ljmp 0x10:processor64
    .long processor64
    .word 0x10
.balign 8
trampoline_gdt:
    .word 0x4f
    .long gdt
.code64
trampoline_end:
processor64:
    mov ecx, 0x1b                   # APIC base: in x2APIC mode, tell the id
    rdmsr
    test eax, 0x400
    jz 8f
    mov ecx, 0x802
    rdmsr
    mov [rip + LAST_ID], eax
8:
    lock inc qword ptr [rip + PROCESSORS]
9:  hlt
    jmp 9b

.section .rodata
exception_text: .asciz "\nEXCEPTION "

.section .data
.balign 16
gdt: .quad 0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff
     .quad 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0, 0, 0
gdt_pointer: .word 0x4f
    .quad gdt
idt_pointer: .word 0xfff
    .quad idt
null_pointer: .word 0
    .quad 0
# 8 GiB one to one in 2 MiB pages, open to ring 3
.balign 4096
pml4: .quad page_directories + 7
    .skip 4088
page_directories:
.set table, 0
.rept 8
    .quad page_directory + table * 4096 + 7
    .set table, table + 1
.endr
    .skip 4032
page_directory:
.set address, 0x87
.rept 4096
    .quad address
    .set address, address + 0x200000
.endr

.section .bss
.balign 4096
idt: .skip 4096
tss: .skip 8448
.balign 4096
    .skip 16384
kernel_stack_top:
    .skip 262144
user_stack_top:
